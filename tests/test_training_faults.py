"""What a training run does when the machine fails it: what was saved is not lost, and the message names the place."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from classifier_runs import config
from tiny import ROOT, TRAINER, write_config

from dcn_plugin.finetune import run

SCRIPT = ROOT / "scripts" / "finetune.py"

# The script, where no file can become larger than so many bytes: what a full disk does, without filling one.
LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launch(*arguments):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="the system has no limit on the size of files")
def test_a_full_disk_is_named_and_the_last_checkpoint_stays(tmp_path, script):
    work_dir = tmp_path / "work"
    run(config(trainer=dict(TRAINER, max_epochs=1)), work_dir)
    last = work_dir / "last.ckpt"
    before = last.read_bytes()
    path = write_config(tmp_path / "more.py", **config(trainer=dict(TRAINER, max_epochs=3)))
    done = launch("-c", LIMITED, len(before) // 2, SCRIPT, path, "--work-dir", work_dir, "--resume")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("OSError: ") and str(work_dir) in done.stderr
    assert last.read_bytes() == before
    assert script("finetune.py", path, "--work-dir", work_dir, "--resume")[0] == 0
    assert torch.load(last, weights_only=True)["epoch"] == 2


def test_a_folder_that_cannot_be_written_to_is_named_before_any_work(tmp_path, script):
    (tmp_path / "file").write_text("")
    path = write_config(tmp_path / "run.py", **config(trainer=dict(TRAINER, max_epochs=1)))
    said, _ = script("finetune.py", path, "--work-dir", tmp_path / "file" / "work")
    assert "Error: " in said and str(tmp_path / "file") in said and "\n" not in said


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_named_before_any_work(tmp_path):
    work_dir = tmp_path / "work"
    work_dir.mkdir(mode=0o500)
    with pytest.raises(PermissionError, match=str(work_dir)):
        run(config(), work_dir)


def test_a_truncated_checkpoint_is_named(tmp_path):
    run(config(trainer=dict(TRAINER, max_epochs=1)), tmp_path)
    last = tmp_path / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=f"{re.escape(str(last))}: expected a readable checkpoint"):
        run(config(trainer=dict(TRAINER, max_epochs=2)), tmp_path, checkpoint="auto")
