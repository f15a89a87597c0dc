"""What warps issue and what their accesses cost, counted from the addresses of the lanes."""

from __future__ import annotations

from collections import Counter

import numpy as np

SECTOR = 32  # bytes


class NoCounts:
    """In place of counts, where nobody asks."""

    active = False
    longest = 0

    def issue(self, opcode: str, warps: int) -> None: ...

    def global_access(self, lanes: np.ndarray, addresses: np.ndarray, size: int, text: str) -> None: ...

    def shared_access(self, lanes: np.ndarray, places: np.ndarray, size: int, text: str) -> None: ...


class Counts(NoCounts):
    active = True

    def __init__(self) -> None:
        self.issued: Counter[str] = Counter()  # by opcode, once for each warp
        self.longest = 0  # of each launch what the warp issues that issues most, added up over the launches
        self.requests = self.sectors = self.fewest_sectors = 0  # of global memory
        self.shared_requests = self.wavefronts = self.fewest_wavefronts = 0

    def issue(self, opcode: str, warps: int) -> None:
        self.issued[opcode] += warps

    def global_access(self, lanes: np.ndarray, addresses: np.ndarray, size: int, text: str) -> None:
        """Sectors that a warp's lanes touch, and how few would hold the bytes that they ask for."""
        warps, warp = np.unique(lanes >> 5, return_inverse=True)
        first = addresses.astype(np.int64) // SECTOR
        self.requests += len(warps)
        self.sectors += len(np.unique(warp << 48 | first))
        places = np.unique(warp << 48 | addresses.astype(np.int64)) >> 48
        self.fewest_sectors += int((-(-np.bincount(places) * size // SECTOR)).sum())

    def shared_access(self, lanes: np.ndarray, places: np.ndarray, size: int, text: str) -> None:
        """Rounds over the 32 banks of 4 bytes. Lanes with 8 bytes take two turns of half a warp, with 16 bytes four."""
        lanes_together = 32 // max(1, size // 4)
        turns, turn = np.unique(lanes // lanes_together, return_inverse=True)
        words = (places // 4)[:, None] + np.arange(max(1, size // 4))
        distinct = np.unique(turn[:, None] << 40 | words)
        used = np.bincount((distinct >> 40) * 32 + distinct % 32, minlength=32 * len(turns)).reshape(-1, 32)
        self.shared_requests += len(np.unique(lanes >> 5))
        self.wavefronts += int(used.max(1).sum())
        self.fewest_wavefronts += int((-(-used.sum(1) // 32)).sum())
