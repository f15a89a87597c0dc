"""The compiled operators under sanitizers: what scripts/sanitize.py runs, shortened, and that its sanitizers see."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NO_LIBRARY = 3

pytestmark = pytest.mark.slow


def sanitize(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run the script; return its exit status and what it printed."""
    command = [sys.executable, str(ROOT / "scripts" / "sanitize.py"), *arguments]
    env = dict(os.environ, **environment)
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == NO_LIBRARY:
        pytest.skip(done.stdout.strip())
    return done.returncode, done.stdout


def test_memory_and_arithmetic():
    code, printed = sanitize(
        "address", "tests/sanitizers/threads.py", "tests/fuzz/test_values.py", "-k", "threads or shape_and_layout"
    )
    assert code == 0, printed[-6000:]


@pytest.mark.parametrize(
    ("fault", "report"),
    [("beyond", "AddressSanitizer: heap-buffer-overflow"), ("overflow", "runtime error: signed integer overflow")],
)
def test_wrong_memory_and_arithmetic_end_the_run(fault, report):
    code, printed = sanitize("address", "tests/sanitizers/spoiled.py", "-k", fault)
    assert code == 1 and report in printed and "passed" not in printed, printed[-6000:]


def test_threads():
    code, printed = sanitize("thread")
    assert code == 0, printed[-6000:]


def test_races_are_reported_in_every_loop(tmp_path):
    go_on = f"halt_on_error=0:log_path={tmp_path}/report"
    code, printed = sanitize("thread", "tests/sanitizers/spoiled.py", "-k", "two_threads", TSAN_OPTIONS=go_on)
    # That of ThreadSanitizer after a report, whatever the tests say.
    assert code == 66 and "1 passed" in printed, printed[-6000:]
