"""Find what a build needs: torch, a C++ compiler, nvcc, ninja. What is missing is named, with what mends it."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[2]
# Machine code also runs on later minors of its major: 8.0's on 8.6, 8.7 and 8.9, 10.0's on 10.3, 12.0's on 12.1.
CUDA_ARCHS = ("7.5", "8.0", "9.0", "10.0", "11.0", "12.0")


def fail(what: str, remedy: str, unable: str = "dcn_plugin cannot be built") -> NoReturn:
    """End the program with a message; pip shows it without a traceback, which an exception would drag along."""
    raise SystemExit(f"\n{unable}: {what}\n  To mend it: {remedy}\n")


def output_of(command: list[str], cwd: Path | None = None) -> str | None:
    """Return what a command printed (both streams), or None when it cannot be run or fails."""
    try:
        done = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def stated_floor() -> tuple[int, int]:
    """Return the oldest torch that is served, as pyproject.toml states it; Python 3.10 has no parser of TOML."""
    stated = re.search(r'^dependencies = \["torch>=(\d+)\.(\d+)"\]$', (ROOT / "pyproject.toml").read_text(), re.M)
    if stated is None:
        fail("pyproject.toml has no line 'dependencies = [\"torch>=X.Y\"]'.", "write it that way.")
    return int(stated[1]), int(stated[2])


TORCH_FLOOR = stated_floor()


class Torch(NamedTuple):
    """The torch to build on, read from its files: importing it costs seconds and may fail for unrelated reasons."""

    version: str
    cuda: str | None
    root: Path

    @classmethod
    def find(cls) -> Torch:
        floor = ".".join(map(str, TORCH_FLOOR))
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            fail(
                f"torch is not installed for {sys.executable}, and without build isolation it has to be.",
                f"`{sys.executable} -m pip install 'torch>={floor}'`, or leave --no-build-isolation out.",
            )
        root = Path(spec.origin).parent
        facts = runpy.run_path(str(root / "version.py"))
        version = str(facts["__version__"])
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < TORCH_FLOOR:
            fail(
                f"torch {version} is installed, but {floor} or newer is needed.",
                f"`{sys.executable} -m pip install -U 'torch>={floor}'`.",
            )
        if not (root / "include/torch/csrc/stable").is_dir():
            fail(f"torch {version} in {root} comes without its C++ headers.", "install torch from its wheels.")
        return cls(version, facts.get("cuda"), root)


class Compiler(NamedTuple):
    command: list[str]
    version: str

    @property
    def host(self) -> str:
        """The compiler without what may stand around it (ccache, flags): nvcc takes a single path."""
        return [word for word in self.command if not word.startswith("-")][-1]

    @classmethod
    def find(cls, named: str | None = None) -> Compiler:
        """Return the compiler that is named, here or by CXX, or the first of the usual ones that runs."""
        named = named or os.environ.get("CXX")
        for candidate in [named] if named else ["c++", "g++", "clang++"]:
            command = shlex.split(candidate)
            version = output_of([*command, "--version"])
            if version is not None:
                return cls(command, version.splitlines()[0])
        fail(
            f"CXX is {named!r}, which does not run." if named else "no C++ compiler (c++, g++ or clang++) is on PATH.",
            "install one (Debian, Ubuntu: `apt install g++`; Fedora: `dnf install gcc-c++`; macOS: `xcode-select "
            "--install`; conda: `conda install cxx-compiler`), or set CXX to it.",
        )


class Nvcc(NamedTuple):
    path: str
    version: str
    architectures: list[str]
    flags: list[str]

    @classmethod
    def find(cls, torch: Torch, compiler: Compiler) -> Nvcc | str:
        """Return the nvcc to use, or the reason why there is none."""
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        if home:
            path = shutil.which("nvcc", path=os.path.join(home, "bin"))
            if path is None:
                return f"CUDA_HOME is {home}, which holds no bin/nvcc"
        else:
            path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
            if path is None:
                return "nvcc was not found (not on PATH, not in /usr/local/cuda; CUDA_HOME is not set)"
        printed = output_of([path, "--version"])
        release = re.search(r"release (\d+\.\d+)", printed or "")
        if release is None:
            return f"{path} does not run"
        version = release[1]
        if torch.cuda and torch.cuda.split(".")[0] != version.split(".")[0]:
            return (
                f"nvcc is CUDA {version} while torch {torch.version} was built for CUDA {torch.cuda}; the majors "
                "must agree (set CUDA_HOME to a matching toolkit, or install a matching torch)"
            )
        trouble = cls.try_out(path, compiler)
        if trouble:
            return f"{path} (CUDA {version}) cannot compile an empty kernel with {compiler.version}: {trouble}"
        known = re.findall(r"compute_(\d+)", output_of([path, "--list-gpu-arch"]) or "")
        try:
            return cls(path, version, *gencode(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), known))
        except ValueError as error:
            return str(error)

    @staticmethod
    def try_out(path: str, compiler: Compiler) -> str | None:
        """Compile and link an empty kernel: finds missing headers, a missing cudart, and a host compiler too new."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "empty.cu")
            source.write_text("#include <cuda_runtime.h>\n__global__ void empty() {}\n")
            command = [path, "-ccbin", compiler.host, "-cudart", "static", "-shared", "-Xcompiler", "-fPIC"]
            done = subprocess.run(
                [*command, str(source), "-o", str(source.with_suffix(".so"))], capture_output=True, text=True
            )
        if done.returncode == 0:
            return None
        lines = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line or "cannot" in line]
        return (lines or done.stderr.splitlines() or ["no message"])[0].strip()


def gencode(wanted: str, known: list[str]) -> tuple[list[str], list[str]]:
    """Turn `TORCH_CUDA_ARCH_LIST` into the list of architectures and nvcc's flags for them.

    `known` are nvcc's own architectures ("75", "120"). Without a wish, the default list is cut to those, and the
    newest also goes in as PTX, for GPUs that are newer still.
    """
    if wanted.strip():
        listed = [entry for entry in re.split(r"[\s;,]+", wanted) if entry]
    else:
        listed = [arch for arch in CUDA_ARCHS if arch.replace(".", "") in known]
        listed[-1:] = [listed[-1] + "+PTX"]
    flags = []
    for entry in listed:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None or match[1] + match[2] not in known:
            offers = ", ".join(f"{known_one[:-1]}.{known_one[-1]}" for known_one in known)
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST holds {entry!r}; write e.g. '8.0;9.0+PTX' (this nvcc offers {offers})"
            )
        arch = match[1] + match[2] + match[3]
        codes = [f"sm_{arch}", f"compute_{arch}"] if match[4] else [f"sm_{arch}"]
        flags += [f"-gencode=arch=compute_{arch},code={code}" for code in codes]
    return listed, flags


def find_ninja() -> str:
    found = shutil.which("ninja")
    if found is None and importlib.util.find_spec("ninja"):
        import ninja

        # A virtual environment used by its interpreter's path, not activated, has its bin folder not on PATH.
        found = shutil.which("ninja", path=ninja.BIN_DIR)
    if found is None:
        fail("ninja is not installed.", f"`{sys.executable} -m pip install ninja`.")
    return found


def find_cuda(torch: Torch, compiler: Compiler) -> Nvcc | str:
    """Decide on the CUDA library: the nvcc to build it with, or the reason why it is left out."""
    mode = os.environ.get("DCN_PLUGIN_CUDA", "auto").lower()
    if mode not in ("auto", "0", "1"):
        fail(f"DCN_PLUGIN_CUDA is {mode!r}.", "set it to auto, 1 or 0.")
    if mode == "0":
        return "DCN_PLUGIN_CUDA=0"
    if sys.platform != "linux":
        nvcc: Nvcc | str = f"CUDA is built on Linux only, not on {sys.platform}"
    else:
        nvcc = Nvcc.find(torch, compiler)
    if mode == "1" and isinstance(nvcc, str):
        fail(
            f"DCN_PLUGIN_CUDA=1 asks for CUDA, but {nvcc}.",
            "correct that, or unset DCN_PLUGIN_CUDA to build for the CPU alone.",
        )
    return nvcc
