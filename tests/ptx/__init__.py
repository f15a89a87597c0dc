"""An interpreter of PTX: what nvcc has made for a GPU runs on the CPU, and every access is checked.

`Device(texts).call(operator, ...)` runs the package's own host code on CPU tensors (tests/emulation) and interprets the
kernels that it launches. To be read in this order:

    parsing.py       text -> kernels and their instructions
    memory.py        tensors, and shared memory, in which warps must not race
    copies.py        asynchronous copies, which arrive at the wait for them
    values.py        registers as numbers
    arithmetic.py, conversions.py, access.py, warps.py    what each instruction does
    threads.py       blocks of threads, branches, barriers
    counts.py        instructions, sectors, wavefronts
    launch.py        compiling, launches of the host code
    jobs.py          stated problems to count on; peers.py: torchvision's kernels on the same (scripts/cuda_counts.py)

It tells nothing about time, and nothing about what ptxas makes of PTX.
"""

from .counts import Counts, NoCounts
from .launch import Device, compile_ptx, kernel_name
from .parsing import PtxError

__all__ = ["Counts", "Device", "NoCounts", "PtxError", "compile_ptx", "kernel_name"]
