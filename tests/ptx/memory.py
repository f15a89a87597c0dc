"""Global and shared memory of the interpreted device: every access is checked before it happens."""

from __future__ import annotations

import bisect
import ctypes

import numpy as np

from .parsing import PtxError

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class GlobalMemory:
    """The memory of tensors of this process: what has been allowed may be read and written, nothing else.

    Arrays begin at the lowest address of a process and end at its highest, so that an index is an address.
    """

    FIRST, END = 1 << 12, (1 << 47) - (1 << 13)

    def __init__(self) -> None:
        raw = np.frombuffer((ctypes.c_uint8 * (self.END - self.FIRST)).from_address(self.FIRST), np.uint8)
        self.words = {size: raw.view(kind) for size, kind in WORDS.items()}
        self.begins: list[int] = []
        self.ends: list[int] = []

    def allow(self, begin: int, size: int) -> None:
        """Overlapping allowances become one."""
        if size <= 0:
            return
        end = begin + size
        low, high = bisect.bisect_left(self.ends, begin + 1), bisect.bisect_right(self.begins, end - 1)
        if low < high:
            begin, end = min(begin, self.begins[low]), max(end, self.ends[high - 1])
        self.begins[low:high], self.ends[low:high] = [begin], [end]

    def forbid_all(self) -> None:
        self.begins, self.ends = [], []

    def check(self, addresses: np.ndarray, size: int, text: str) -> None:
        if (addresses & np.uint64(size - 1)).any():
            raise PtxError(f"{text}: expected addresses divisible by {size}, got {_first_odd(addresses, size):#x}")
        low, high = int(addresses.min()), int(addresses.max())
        at = bisect.bisect_right(self.begins, low) - 1
        if at >= 0 and high + size <= self.ends[at]:
            return
        begins, ends = np.array(self.begins, np.uint64), np.array(self.ends, np.uint64)
        found = np.searchsorted(begins, addresses, "right") - 1
        outside = (found < 0) | (addresses + np.uint64(size) > ends[found])
        if outside.any():
            raise PtxError(f"{text}: expected addresses within a tensor, got {int(addresses[outside][0]):#x}")

    def load(self, addresses: np.ndarray, size: int, number: int = 0) -> np.ndarray:
        """Number `number` of a vector of values of `size` bytes."""
        return self.words[size][self._index(addresses, size) + number]

    def store(self, addresses: np.ndarray, size: int, values: np.ndarray, number: int = 0) -> None:
        self.words[size][self._index(addresses, size) + number] = values

    def _index(self, addresses: np.ndarray, size: int) -> np.ndarray:
        return (addresses.astype(np.int64) - self.FIRST) // size


def _first_odd(addresses: np.ndarray, size: int) -> int:
    return int(addresses[(addresses & np.uint64(size - 1)) != 0][0])


class SharedMemory:
    """Shared memory of some blocks at once, NaN in every type at first.

    Between two barriers a warp may neither read nor overwrite what another has written, nor overwrite what another has
    read: warps run in any order there.
    """

    MANY = (1 << 20) - 1  # in place of a warp's number: several have read

    def __init__(self, bytes_of_block: int, blocks: int, threads_of_block: int) -> None:
        self.size = bytes_of_block
        self.pitch = -(-bytes_of_block // 128) * 128
        raw = np.full(self.pitch * blocks, 0xFF, np.uint8)
        self.words = {size: raw.view(kind) for size, kind in WORDS.items()}
        self.base = np.repeat(np.arange(blocks, dtype=np.int64) * self.pitch, threads_of_block)
        # Of each two bytes: in which period between barriers, by which warp.
        self.written, self.read = (np.full(len(raw) // 2, -1, np.int64) for _ in range(2))
        self.period = 0

    def barrier(self) -> None:
        self.period += 1

    def places(self, lanes: np.ndarray, offsets: np.ndarray, size: int, text: str) -> np.ndarray:
        """Offsets in the blocks of these lanes -> offsets in the memory of all."""
        offsets = offsets.astype(np.int64)
        if (offsets & (size - 1)).any():
            raise PtxError(f"{text}: expected shared addresses divisible by {size}")
        if offsets.min() < 0 or offsets.max() + size > self.size:
            raise PtxError(
                f"{text}: expected {self.size} bytes of shared memory to suffice, got {offsets.min()} to "
                f"{offsets.max() + size}"
            )
        return offsets + self.base[lanes]

    def note_read(self, lanes: np.ndarray, places: np.ndarray, size: int, text: str) -> None:
        at, mine = self._pieces(lanes, places, size)
        before = self.written[at]
        if ((before != mine) & (before >> 20 == self.period)).any():
            raise PtxError(f"{text}: expected a barrier between a warp's write and another's read")
        last = self.read[at]
        self.read[at] = mine
        # Others have read in this period: before this access, or with it.
        shared = ((last != mine) & (last >> 20 == self.period)) | (self.read[at] != mine)
        self.read[at[shared]] = self.period << 20 | self.MANY

    def note_write(self, lanes: np.ndarray, places: np.ndarray, size: int, text: str) -> None:
        at, mine = self._pieces(lanes, places, size)
        for what, before in (("write", self.written[at]), ("read", self.read[at])):
            if ((before != mine) & (before >> 20 == self.period)).any():
                raise PtxError(f"{text}: expected a barrier between a warp's {what} and another's write")
        self.written[at] = mine
        if (self.written[at] != mine).any():
            raise PtxError(f"{text}: expected warps to write to different places")

    def _pieces(self, lanes: np.ndarray, places: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        mine = (lanes >> 5) | (self.period << 20)
        if size <= 2:
            return places >> 1, mine
        at = (places >> 1)[:, None] + np.arange(size // 2)
        return at.ravel(), np.repeat(mine, size // 2)
