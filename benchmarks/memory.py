"""Peak memory of a call above its arguments and its results.

On the CPU a fresh process makes the call and reads from the kernel (Linux) how far its resident memory rose. Scratch
memory that an operator keeps for the next call is part of that: it is the first call of its thread.
"""

import ctypes
import multiprocessing
import re
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Modules of peers that take seconds to import, where they are installed.
PEERS = ("transformers.models.deformable_detr.modeling_deformable_detr", "torch_ms_deform_attn", "deformops.registry")
RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
Make = Callable[..., Callable[[], list[Tensor]]]


def peak_mib(make: Make, small: tuple[Any, ...], arguments: tuple[Any, ...], device: str = "cpu") -> float | None:
    """MiB by which memory rises during `make(*arguments)()` above what stands before it and what it returns.

    `make(*small)()` is called first and is to be a small problem of the same kind: it starts the libraries. `make`
    and its arguments have to be picklable. None where the system does not tell.
    """
    if device == "cuda":
        return _on_cuda(make(*arguments)) / 2**20
    if not RESET.exists():
        return None
    # The server has imported what takes long and has started no thread; each process is a fork of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "dcn_plugin", "timm", *PEERS])
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(_in_fresh_process, make, small, arguments, torch.get_num_threads()).result() / 2**20


def _in_fresh_process(make: Make, small: tuple[Any, ...], arguments: tuple[Any, ...], threads: int) -> int:
    torch.set_num_threads(threads)
    # In a thread of its own, with which the scratch memory goes.
    warm_up = threading.Thread(target=lambda: make(*small)())
    warm_up.start()
    warm_up.join()
    call = make(*arguments)
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        # Freed pages that the allocator still holds would be used again unseen.
        libc.malloc_trim(0)
    RESET.write_text("5")  # VmHWM starts anew from what is resident now
    before = _status()
    results = call()
    after = _status()
    # Pages of libraries that are read for the first time are no memory of the call's.
    loaded = after["RssFile"] - before["RssFile"]
    return 1024 * (after["VmHWM"] - before["VmRSS"] - loaded) - _bytes(results)


def _status() -> dict[str, int]:
    return {name: int(kb) for name, kb in re.findall(r"(\w+):\s+(\d+) kB", STATUS.read_text())}


def _on_cuda(call: Callable[[], list[Tensor]]) -> int:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - _bytes(results)


def _bytes(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
