"""The package's own host code as on a GPU, but on CPU tensors and with interpreted kernels: launches go here."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import emulation
import torch
from toolchain import ROOT, Compiler, NinjaFile, Nvcc, Torch, cuda_flags
from torch.utils._python_dispatch import TorchDispatchMode

from .counts import NoCounts
from .memory import GlobalMemory
from .parsing import Module, PtxError
from .threads import Step, Threads, decode

ARCHITECTURE = "compute_90"
# So many threads run side by side: enough to make the interpreter's own steps cheap, few enough for the caches.
TOGETHER = 8192


def compile_ptx(sources: list[str]) -> list[Path]:
    """Compile CUDA sources to PTX, those that have changed; raise LookupError where there is no nvcc."""
    found, compiler = Torch.find(), Compiler.find()
    nvcc = Nvcc.find(found, compiler)
    if isinstance(nvcc, str):
        raise LookupError(nvcc)
    ninja = NinjaFile(f"ptx-torch{found.version}")
    command = [nvcc.path, "-ccbin", compiler.host]
    ninja.compiling("ptx", command, [*cuda_flags(found), f"-arch={ARCHITECTURE}"], phase="-ptx")
    # Operators may share a source.
    made = {source: ninja.build(f"{source}.ptx", "ptx", [source]) for source in dict.fromkeys(sources)}
    done = ninja.run(list(made.values()), capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [ROOT / made[source] for source in sources]


@functools.cache
def _demangler() -> Any:
    function = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    function.restype = ctypes.c_void_p
    return function


def demangle(name: str) -> str:
    """A C++ name or type as people write it; what is none comes back as it is."""
    status = ctypes.c_int()
    found = _demangler()(name.encode(), None, None, ctypes.byref(status))
    if status.value:
        return name
    text = ctypes.string_at(found).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(found))
    return text.replace(" >", ">")


class _Memory(TorchDispatchMode):
    """Lets kernels reach the tensors that the host code makes."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.device.allow(tensor)
        return made


class Device:
    """Interprets the kernels of some PTX modules.

    `counts` may give what counts a launch, from the kernel's name; `only_blocks` which of its blocks run, where results
    are no matter.
    """

    def __init__(
        self, texts: list[str], counts: Callable[[str], NoCounts] | None = None,
        only_blocks: Callable[[str, int], range] | None = None,
    ) -> None:  # fmt: skip
        self.memory = GlobalMemory()
        self.kept: list[torch.Tensor] = []
        self.counts, self.only_blocks = counts, only_blocks
        self.failure: BaseException | None = None
        self.launched: list[str] = []
        self.steps: dict[str, list[Step]] = {}
        self.entries: dict[str, tuple[Module, str]] = {}
        for module in map(Module, texts):
            for name in module.texts:
                # "void dcn::run_body<T>(T)": kernels are found by run_body<T>.
                self.entries[kernel_name(name)] = module, name

    def allow(self, tensor: torch.Tensor) -> None:
        """Its memory may be read and written, and is kept until the end of the call."""
        storage = tensor.untyped_storage()
        self.memory.allow(storage.data_ptr(), storage.nbytes())
        self.kept.append(tensor)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call an emulated operator."""
        op = getattr(emulation.load(), name).default
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor):
                self.allow(tensor)
        self.failure = None
        try:
            with self._connected(), _Memory(self):
                # Straight to the kernel, so that the mode sees what that calls.
                found = op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *arguments)
        finally:
            self.memory.forbid_all()
            self.kept.clear()
        if self.failure is not None:
            raise self.failure
        return found

    @contextmanager
    def _connected(self) -> Iterator[None]:
        launch, allocated = _LAUNCH(self._launch_type), _ALLOCATED(self.memory.allow)
        library = ctypes.CDLL(str(emulation.library()))
        library.set_interpreter(_Hooks(launch, allocated))
        try:
            yield
        finally:
            library.set_interpreter(_Hooks())

    def _launch_type(
        self, kernel: bytes, arguments: int, size: int, blocks: int, threads: int, shared: int, whole_blocks: bool
    ) -> None:
        if self.failure is not None:
            return
        try:
            function = "run_blocks" if whole_blocks else "run_body"
            self.launch(
                f"{function}<{demangle(kernel.decode())}>", ctypes.string_at(arguments, size), blocks, threads, shared
            )
        except BaseException as error:  # which C++ would lose
            self.failure = error

    def launch(self, name: str, parameters: bytes, blocks: int, threads: int, shared: int) -> None:
        if name not in self.entries:
            raise PtxError(f"{name}: expected a kernel of the modules")
        module, entry = self.entries[name]
        kernel = module.kernel(entry)
        if name not in self.steps:
            self.steps[name] = decode(kernel)
        self.launched.append(name)
        counts = self.counts(name) if self.counts else NoCounts()
        chosen = self.only_blocks(name, blocks) if self.only_blocks else range(blocks)
        together = max(1, TOGETHER // threads)
        longest = 0
        for first in range(chosen.start, chosen.stop, together):
            some = Threads(
                self.steps[name], first, min(together, chosen.stop - first), blocks, threads, parameters,
                kernel.shared_bytes + shared, self.memory, counts,
            )  # fmt: skip
            longest = max(longest, some.run())
        counts.longest += longest


def kernel_name(mangled: str) -> str:
    """The kernel with its template's arguments, without namespaces of its own, result and parameters."""
    name = re.sub(r"\(anonymous namespace\)::", "", demangle(mangled)).removeprefix("void ")
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and not depth:
            name = name[:at]
            break
    return re.sub(r"^(?:\w+::)*", "", name)


_LAUNCH = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_bool,
)
_ALLOCATED = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)


class _Hooks(ctypes.Structure):
    _fields_ = [("launch", _LAUNCH), ("allocated", _ALLOCATED)]
