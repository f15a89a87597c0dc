"""Build the two operator libraries; whatever is mere metadata stands in pyproject.toml.

`_C` (schemas and CPU kernels, from `csrc/**/*.cpp`) and `_C_cuda` (CUDA kernels, from `csrc/**/*.cu`) are plain
shared libraries on LibTorch's stable ABI. They hold no Python symbol, so one build serves every Python, and every torch
from the floor up.

Environment:
    DCN_PLUGIN_CUDA        `auto` (default: the CUDA library is built when there is a usable nvcc), `1`, `0`
    TORCH_CUDA_ARCH_LIST   e.g. `"8.0;9.0+PTX"`; the default covers every GPU from 7.5 up that nvcc knows
    CUDA_HOME              toolkit to use; by default the nvcc on PATH
    CXX, CXXFLAGS, LDFLAGS, NVCC_FLAGS   compiler and additional flags
    MAX_JOBS               parallel compilations
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple, NoReturn

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_FLOOR = (2, 11)
# Machine code also runs on later minors of its major: 8.0's on 8.6, 8.7 and 8.9, 10.0's on 10.3, 12.0's on 12.1.
CUDA_ARCHS = ("7.5", "8.0", "9.0", "10.0", "11.0", "12.0")
STANDARD = "-std=c++17"


def fail(what: str, remedy: str) -> NoReturn:
    """End the build with a message; pip shows it without a traceback, which an exception would drag along."""
    raise SystemExit(f"\ndcn_plugin cannot be built: {what}\n  To mend it: {remedy}\n")


def output_of(command: list[str], cwd: Path | None = None) -> str | None:
    """Return what a command printed (both streams), or None when it cannot be run or fails."""
    try:
        done = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


if int(setuptools.__version__.split(".")[0]) < 77:
    fail(
        f"setuptools {setuptools.__version__} is too old to read pyproject.toml; 77.0.3 or newer is needed.",
        f"`{sys.executable} -m pip install -U setuptools ninja`, or leave --no-build-isolation out.",
    )

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402  (the older ones do not have it)


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
    def find(cls) -> Compiler:
        named = os.environ.get("CXX")
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


class NinjaFile:
    """The text of a build.ninja; ninja itself does the parallelism, the header tracking and the up-to-date checks."""

    def __init__(self) -> None:
        self.text = "ninja_required_version = 1.5\n"

    def rule(self, name: str, command: list[str], compiles: bool) -> None:
        # $in and $out are ninja's, and it quotes them; everything else may hold a space or a dollar.
        own = ("$in", "$out", "$out.d")
        words = [word if word in own else shlex.quote(word).replace("$", "$$") for word in command]
        self.text += f"rule {name}\n  command = {' '.join(words)}\n  description = {name} $out\n"
        if compiles:
            self.text += "  depfile = $out.d\n  deps = gcc\n"

    def build(self, output: str, rule: str, inputs: list[str]) -> str:
        escaped = [re.sub(r"([$ :])", r"$\1", path) for path in [output, *inputs]]
        self.text += f"build {escaped[0]}: {rule} {' '.join(escaped[1:])}\n"
        return output


def build_folder(torch: Torch) -> Path:
    """Where objects outlive pip's temporary folders, so that `pip install -e .` compiles only what has changed.

    One folder per torch: environments that share a checkout do not undo each other's work.
    """
    name = f"{sys.platform}-{platform.machine()}-torch{torch.version}"
    return ROOT / "build" / re.sub(r"[^\w.+-]", "_", name)


def compile_jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def environment_flags(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def write_ninja(folder: Path, torch: Torch, compiler: Compiler, nvcc: Nvcc | str, jobs: int) -> list[str]:
    """Write `folder/build.ninja` (paths relative to the root, from which ninja runs); return the libraries' paths."""
    cpp = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
    cu = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cu"))
    if not cpp:
        fail(f"there are no sources in {ROOT / 'csrc'}.", "use a complete checkout or source distribution.")
    here = str(folder.relative_to(ROOT))
    floor = f"-DTORCH_TARGET_VERSION=0x{TORCH_FLOOR[0]:02x}{TORCH_FLOOR[1]:02x}000000000000"
    includes = ["-Icsrc", "-isystem", str(torch.root / "include")]
    optimise = [STANDARD, "-O3", "-DNDEBUG", floor]
    visibility = ["-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
    # The libraries name libtorch by its soname alone: whichever torch is loaded already satisfies that.
    torch_libs = [f"-L{torch.root / 'lib'}", "-ltorch_cpu"]
    # A symbol that nothing defines is an error here, not later on the user's machine.
    shared = ["-dynamiclib"] if sys.platform == "darwin" else ["-shared", "-Wl,-z,defs"]

    ninja = NinjaFile()
    # `#pragma omp simd` without an OpenMP library: it lets sums be reordered, which vectors need.
    # Comparisons and square roots have no side effects here, so that loops with conditions become vectors too.
    simd = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
    warnings = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    compile_cpp = [*compiler.command, "-MD", "-MF", "$out.d", *includes, *optimise, *simd, *visibility, *warnings]
    ninja.rule("cxx", [*compile_cpp, *environment_flags("CXXFLAGS"), "-c", "$in", "-o", "$out"], compiles=True)
    link = [*compiler.command, *shared, "$in", "-o", "$out", *torch_libs, *environment_flags("LDFLAGS")]
    ninja.rule("link", link, compiles=False)
    objects = [ninja.build(f"{here}/{source}.o", "cxx", [source]) for source in cpp]
    libraries = [ninja.build(f"{here}/_C.so", "link", objects)]

    if cu and isinstance(nvcc, Nvcc):
        host = ["-ccbin", compiler.host]
        passed_on = [f"-Xcompiler={flag}" for flag in visibility]
        compile_cu = [nvcc.path, *host, "-MD", "-MF", "$out.d", *includes, *optimise, *nvcc.flags, *passed_on]
        compile_cu += ["-DUSE_CUDA", "--expt-relaxed-constexpr", "--threads", str(max(1, jobs // len(cu)))]
        ninja.rule("nvcc", [*compile_cu, *environment_flags("NVCC_FLAGS"), "-c", "$in", "-o", "$out"], compiles=True)
        # cudart is linked statically, so that the file asks nothing of the machine but torch and a driver.
        link_cu = [nvcc.path, *host, "-shared", "-cudart", "static", "-Xlinker=--exclude-libs,ALL", "$in", "-o", "$out"]
        ninja.rule("nvlink", [*link_cu, *cuda_libs(folder, torch, compiler)], compiles=False)
        objects = [ninja.build(f"{here}/{source}.o", "nvcc", [source]) for source in cu]
        libraries.append(ninja.build(f"{here}/_C_cuda.so", "nvlink", objects))

    script = folder / "build.ninja"
    if not script.exists() or script.read_text() != ninja.text:
        script.write_text(ninja.text)
    return libraries


def cuda_libs(folder: Path, torch: Torch, compiler: Compiler) -> list[str]:
    """Link flags for libtorch_cuda; beside a CPU-only torch, an empty library of that name stands in for it."""
    place = torch.root / "lib"
    if not (place / "libtorch_cuda.so").exists():
        place = folder / "stand_in"
        place.mkdir(exist_ok=True)
        stand_in = ["-shared", "-x", "c++", "/dev/null", "-Wl,-soname,libtorch_cuda.so", "-o"]
        subprocess.run([*compiler.command, *stand_in, str(place / "libtorch_cuda.so")], check=True)
    return [f"-L{torch.root / 'lib'}", f"-L{place}", "-Xlinker=--no-as-needed", "-ltorch_cpu", "-ltorch_cuda"]


def build_info(version: str, torch: Torch, compiler: Compiler, nvcc: Nvcc | str, with_cuda: bool) -> str:
    """Return what dcn_plugin._extension.info() will tell about the libraries, as JSON."""
    cuda = {"version": nvcc.version, "architectures": nvcc.architectures} if isinstance(nvcc, Nvcc) else None
    info = {
        "version": version,
        "torch": torch.version,
        "torch_floor": ".".join(map(str, TORCH_FLOOR)),
        "compiler": compiler.version,
        "platform": f"{sys.platform} {platform.machine()}",
        "cuda": cuda if with_cuda else None,
        "without_cuda_because": nvcc if isinstance(nvcc, str) else None,
    }
    return json.dumps(info, indent=2) + "\n"


class BuildLibraries(build_ext):
    """`build_ext` that hands the whole compilation to ninja and puts the libraries into the package."""

    FILES = ("_C.so", "_C_cuda.so", "_build_info.json")

    def run(self) -> None:
        if sys.platform == "win32":
            fail("Windows is not supported natively.", "use Linux, macOS, or WSL 2 on Windows.")
        torch, compiler = requirements()
        ninja = find_ninja()
        nvcc = find_cuda(torch, compiler)
        folder, jobs = build_folder(torch), compile_jobs()
        folder.mkdir(parents=True, exist_ok=True)
        libraries = write_ninja(folder, torch, compiler, nvcc, jobs)
        info = build_info(self.distribution.get_version(), torch, compiler, nvcc, len(libraries) == 2)
        if isinstance(nvcc, str):
            libraries_of = f"the CPU alone, because {nvcc}"
        else:
            libraries_of = f"CUDA {nvcc.version} ({' '.join(nvcc.architectures)}) and the CPU"
        command = [ninja, "-f", str(folder.relative_to(ROOT) / "build.ninja"), "-j", str(jobs), *libraries]
        info_file = folder / "_build_info.json"
        up_to_date = "no work to do" in (output_of([*command, "-n"], cwd=ROOT) or "")
        if not up_to_date or not info_file.exists() or info_file.read_text() != info:
            print(f"dcn_plugin: operators for {libraries_of}; torch {torch.version}, {compiler.version}", flush=True)
        if not up_to_date and subprocess.run(command, cwd=ROOT).returncode:
            without = " (DCN_PLUGIN_CUDA=0 builds without CUDA meanwhile)" if len(libraries) == 2 else ""
            fail("the compiler reported errors (above).", f"report the first of them, with its command{without}.")
        info_file.write_text(info)

        package = ROOT / "dcn_plugin" if self.inplace else Path(self.build_lib, "dcn_plugin")
        package.mkdir(parents=True, exist_ok=True)
        built = {path.name: path for path in [info_file, *(ROOT / library for library in libraries)]}
        for name in self.FILES:
            target = package / name
            if name not in built:
                target.unlink(missing_ok=True)
                continue
            # Replaced, not overwritten: a process that has the old library mapped keeps it.
            shutil.copy2(built[name], target.with_name(name + ".new"))
            os.replace(target.with_name(name + ".new"), target)

    def get_outputs(self) -> list[str]:
        # In place, nothing is in build_lib: the files stand beside the Python sources.
        names = [] if self.inplace else self.FILES
        return [str(path) for name in names if (path := Path(self.build_lib, "dcn_plugin", name)).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """One wheel per platform, for every Python 3: the libraries are no Python modules."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def requirements() -> tuple[Torch, Compiler]:
    return Torch.find(), Compiler.find()


if __name__ == "__main__":
    if "dist_info" in sys.argv:
        # pip asks for metadata before it downloads the dependencies and builds: say what is missing now, not then.
        requirements()
    setup(
        ext_modules=[Extension("dcn_plugin._C", sources=[])],  # says that the package is not pure Python
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
    )
