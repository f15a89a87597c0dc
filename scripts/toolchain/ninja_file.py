"""A build.ninja of ours: ninja itself does the parallelism, the tracking of headers and the up-to-date checks."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

from .find import ROOT, find_ninja, output_of


def compile_jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


class NinjaFile:
    """The build.ninja of a folder below build/. Ninja runs in the root, so paths in it are relative to that."""

    def __init__(self, name: str) -> None:
        self.folder = ROOT / "build" / re.sub(r"[^\w.+-]", "_", name)
        self.script = self.folder / "build.ninja"
        self.text = "ninja_required_version = 1.5\n"
        self.outputs: dict[str, list[str]] = defaultdict(list)  # of each rule

    def compiling(self, name: str, compiler: list[str], flags: list[str], phase: str = "-c") -> None:
        """Add a rule that compiles one source, as far as the phase that the compiler's option names."""
        self._rule(name, [*compiler, "-MD", "-MF", "$out.d", *flags, phase, "$in", "-o", "$out"])
        self.text += "  depfile = $out.d\n  deps = gcc\n"

    def linking(self, name: str, linker: list[str], libraries: list[str]) -> None:
        """Add a rule that links objects, and after them what they need."""
        self._rule(name, [*linker, "$in", "-o", "$out", *libraries])

    def _rule(self, name: str, command: list[str]) -> None:
        # $in and $out are ninja's, and it quotes them; everything else may hold a space or a dollar.
        own = ("$in", "$out", "$out.d")
        words = [word if word in own else shlex.quote(word).replace("$", "$$") for word in command]
        self.text += f"rule {name}\n  command = {' '.join(words)}\n  description = {name} $out\n"

    def build(self, output: str, rule: str, inputs: list[str]) -> str:
        """Add a file of this folder that a rule makes; return its path."""
        made = f"{self.folder.relative_to(ROOT)}/{output}"
        escaped = [re.sub(r"([$ :])", r"$\1", path) for path in [made, *inputs]]
        self.text += f"build {escaped[0]}: {rule} {' '.join(escaped[1:])}\n"
        self.outputs[rule].append(made)
        return made

    def written(self) -> str:
        """Return what the last run left in the folder: another text than this one's, or none, if anything changed."""
        return self.script.read_text() if self.script.exists() else ""

    def _command(self, targets: list[str], *options: str) -> list[str]:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.written() != self.text:
            self.script.write_text(self.text)
        return [find_ninja(), "-f", str(self.script.relative_to(ROOT)), *options, *targets]

    def up_to_date(self, targets: list[str]) -> bool:
        return "no work to do" in (output_of(self._command(targets, "-n"), cwd=ROOT) or "")

    def run(self, targets: list[str], **streams: Any) -> subprocess.CompletedProcess[str]:
        """Bring targets up to date; a process that comes second waits, and finds them done."""
        import fcntl  # which Windows has not

        self.folder.mkdir(parents=True, exist_ok=True)
        with Path(self.folder, "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            command = self._command(targets, "-j", str(compile_jobs()))
            return subprocess.run(command, cwd=ROOT, text=True, **streams)
