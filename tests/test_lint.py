"""The checks of .pre-commit-config.yaml, so that one command runs everything."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(str(path) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))
CHECKS = {
    "ruff": ["ruff", "check", "."],
    "ruff-format": ["ruff", "format", "--check", "."],
    "clang-format": ["clang-format", "--dry-run", "-Werror", *SOURCES],
    "mypy": ["mypy"],
}


@pytest.mark.parametrize("check", CHECKS)
def test_lint(check):
    if check == "mypy" and sys.version_info < (3, 11):
        pytest.skip("the annotations of torch's floor, which is what Python 3.10 gets, lack what newer ones have")
    tool, *arguments = CHECKS[check]
    path = shutil.which(tool, path=str(Path(sys.executable).parent)) or shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed (it is in the extra `dev`)")
    done = subprocess.run([path, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if check == "mypy":
        checked = [ROOT / "setup.py", *(p for part in ("dcn_plugin", "scripts") for p in (ROOT / part).rglob("*.py"))]
        assert f"no issues found in {len(checked)} source files" in done.stdout
