"""Run a piece of Python in a fresh interpreter that sees the same package as the tests do."""

import os
import subprocess
import sys
from pathlib import Path

import dcn_plugin

# torchao 0.18 calls what torch 2.15 deprecates, and MMEngine's optimizers import transformers, which imports torchao.
OF_TORCHAO = "register_constant() on Enum subclasses is deprecated"


def run_python(code: str, *options: str, path: Path | None = None) -> str:
    """Run `code` with interpreter `options`, `path` first on `sys.path`; return stdout, fail on any stderr."""
    entries = [path, Path(dcn_plugin.__file__).parents[1], os.environ.get("PYTHONPATH")]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(str(entry) for entry in entries if entry))
    command = [sys.executable, *options, "-c", code]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if OF_TORCHAO not in line] == []
    return result.stdout
