"""Run pieces of Python as if each had an interpreter of its own, at a fraction of the time.

One interpreter imports what is large and not under test, and forks for each piece.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import dcn_plugin

SERVER = """
import contextlib, json, os, sys, traceback
import cv2, numpy, timm, torch, torchvision
with contextlib.suppress(ImportError):
    from transformers import Adafactor  # what MMEngine's optimizers import
for line in sys.stdin:
    job = json.loads(line)
    read, write = os.pipe()
    if not (child := os.fork()):
        failed = 0
        with os.fdopen(write, "w") as out, contextlib.redirect_stdout(out):
            try:
                sys.path[:0] = job["path"]
                exec(compile(job["code"], "<code>", "exec"), {"__name__": "__main__"})
            except BaseException:
                failed = 1
                traceback.print_exc(file=out)
        os._exit(failed)
    os.close(write)
    with os.fdopen(read) as out:
        said = out.read()
    print(json.dumps([os.waitpid(child, 0)[1], said]), flush=True)
"""


class Forks:
    """Has `run(code, path)`, which returns what the code printed and fails if it raised."""

    def __enter__(self):
        entries = [str(Path(dcn_plugin.__file__).parents[1]), os.environ.get("PYTHONPATH")]
        env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, entries)), OMP_NUM_THREADS="1")
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self

    def __exit__(self, *_):
        self.server.communicate(timeout=60)

    def run(self, code: str, path: Path | None = None) -> str:
        job = dict(code=code, path=[] if path is None else [str(path)])
        print(json.dumps(job), file=self.server.stdin, flush=True)
        status, said = json.loads(self.server.stdout.readline())
        assert status == 0, said
        return said
