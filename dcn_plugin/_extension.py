"""The operator libraries: where they are, what they were built with, and what to do when they do not load."""

from __future__ import annotations

import functools
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from ._version import __version__

PACKAGE = Path(__file__).resolve().parent
CPU_LIBRARY = PACKAGE / "_C.so"
CUDA_LIBRARY = PACKAGE / "_C_cuda.so"
BUILD_INFO = PACKAGE / "_build_info.json"

# What the dynamic loader says -> what it means. The first that matches explains the failure.
_CAUSES = {
    r"libtorch\S*: cannot open": "the running torch does not contain the library of torch that it needs",
    r"GLIBC|CXXABI|GLIBCXX": "it was built on a newer system than this one, against a newer C or C++ library",
    r"undefined symbol|symbol not found": "it does not fit the running torch",
    r"invalid ELF|wrong ELF|ELF file|Exec format|incompatible architecture|file too short": (
        "it is damaged, or was built for another kind of machine"
    ),
}


class ExtensionError(ImportError):
    """The compiled operators are missing or do not load; the message names the cause and the command that mends it."""


def rebuild_command(cuda: bool = False) -> str:
    """Return the shell command that compiles the operators anew for the running interpreter."""
    checkout = PACKAGE.parent
    switch = "DCN_PLUGIN_CUDA=1 " if cuda else ""
    pip = f"{switch}{shlex.quote(sys.executable)} -m pip install --no-build-isolation"
    if (checkout / "csrc").is_dir() and (checkout / "setup.py").is_file():
        return f"{pip} -e {shlex.quote(str(checkout))}"
    return f"{pip} --no-deps --force-reinstall <the folder or URL that dcn_plugin was installed from>"


def _explain(library: Path, error: Exception) -> str:
    said = str(error.__cause__ or error)  # torch wraps what the dynamic loader said
    meaning = next((text for pattern, text in _CAUSES.items() if re.search(pattern, said)), None)
    built = info()
    lines = [f"The compiled operators of dcn_plugin do not load: {meaning or 'the dynamic loader refuses the file'}."]
    lines.append(f"  File: {library}")
    lines.append(f"  Loader: {said}")
    if built:
        lines.append(f"  Built on torch {built['torch']} ({built['platform']}); running torch is {torch.__version__}.")
    lines.append(f"  To mend it, build them here: {rebuild_command(library == CUDA_LIBRARY)}")
    return "\n".join(lines)


def info() -> dict[str, Any]:
    """Return what the libraries were built with (empty when that is not known).

    Keys: `version` of the package, `torch`, `torch_floor`, `compiler`, `platform`, `sources` (of `csrc/`),
    `cuda` (None, or a dictionary of `version` and `architectures`), `without_cuda_because` (None, or the reason).
    """
    try:
        return dict(json.loads(BUILD_INFO.read_text()))
    except (OSError, ValueError):
        return {}


def cuda_built() -> bool:
    """Whether the CUDA library was built (not whether this machine can run it)."""
    return CUDA_LIBRARY.is_file()


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


@functools.cache
def load() -> None:
    """Load the operator libraries into torch: always `_C`, and `_C_cuda` beside a torch with CUDA.

    A CUDA library that is missing or does not load leaves the CPU operators working; the reason is raised by the first
    call on a CUDA tensor.

    Raises:
        ExtensionError: when the running torch is too old, or the CPU library is missing or does not load.
    """
    floor = info().get("torch_floor")
    if floor is not None and _minor(torch.__version__) < _minor(floor):
        raise ExtensionError(
            f"dcn_plugin {__version__} needs torch {floor} or newer, but torch {torch.__version__} is running.\n"
            f"  To mend it: {sys.executable} -m pip install -U 'torch>={floor}'"
        )
    if not CPU_LIBRARY.is_file():
        raise ExtensionError(
            f"The operators of dcn_plugin are not compiled: {CPU_LIBRARY} does not exist.\n"
            f"  To mend it: {rebuild_command()}"
        )
    try:
        torch.ops.load_library(str(CPU_LIBRARY))
    except OSError as error:
        raise ExtensionError(_explain(CPU_LIBRARY, error)) from error
    cause = _load_cuda()
    if cause is not None:
        _raise_on_cuda_tensors(cause)


def _load_cuda() -> str | None:
    """Load the CUDA library; return why it is not there although the running torch has CUDA."""
    if torch.version.cuda is None:
        return None
    if not cuda_built():
        reason = info().get("without_cuda_because") or "the CUDA library is missing"
        return (
            f"The operators of dcn_plugin were built without CUDA: {reason}.\n"
            f"  To mend it, with a CUDA toolkit whose nvcc is on PATH: {rebuild_command(cuda=True)}"
        )
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:
        return _explain(CUDA_LIBRARY, error)
    return None


_stand_ins: list[torch.library.Library] = []


def _raise_on_cuda_tensors(cause: str) -> None:
    """Give every operator a CUDA kernel that raises `cause`: torch's own message would name neither cause nor cure."""

    def unavailable(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(cause)

    library = torch.library.Library("dcn_plugin", "IMPL")
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU"):
        if name.startswith("dcn_plugin::"):
            library.impl(name.removeprefix("dcn_plugin::"), unavailable, "CUDA")
    _stand_ins.append(library)  # the registrations live as long as the library object
