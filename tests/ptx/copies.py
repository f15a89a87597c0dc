"""Asynchronous copies into shared memory: they arrive when their thread waits for them, and not before."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .memory import GlobalMemory, SharedMemory


class Copy(NamedTuple):
    lanes: np.ndarray
    places: np.ndarray
    addresses: np.ndarray
    wanted: np.ndarray  # bytes: all, or none where zeros are to be written
    groups: np.ndarray  # of each lane, the number of the group that it belongs to
    size: int


class Copies:
    def __init__(self, threads: int, memory: GlobalMemory, shared: SharedMemory) -> None:
        self.memory, self.shared = memory, shared
        self.committed = np.zeros(threads, np.int64)  # groups of each thread
        self.pending: list[Copy] = []

    def start(
        self, lanes: np.ndarray, places: np.ndarray, addresses: np.ndarray, wanted: np.ndarray, size: int, text: str
    ) -> None:
        # From now on the place holds anything.
        self.shared.note_write(lanes, places, size, text)
        for word in range(0, size, 4):
            self.shared.words[4][(places + word) // 4] = 0xFFFFFFFF
        self.pending.append(Copy(lanes, places, addresses, wanted, self.committed[lanes], size))

    def commit(self, lanes: np.ndarray) -> None:
        self.committed[lanes] += 1

    def wait(self, lanes: np.ndarray, newest: int, text: str) -> None:
        """Let all committed groups of these threads arrive, but for the `newest`."""
        limit = np.full(len(self.committed), -1, np.int64)
        limit[lanes] = self.committed[lanes] - newest
        left = []
        for copy in self.pending:
            arrive = copy.groups < limit[copy.lanes]
            if arrive.any():
                self._finish(Copy(*(part[arrive] for part in copy[:5]), copy.size), text)
            if not arrive.all():
                left.append(Copy(*(part[~arrive] for part in copy[:5]), copy.size))
        self.pending = left

    def _finish(self, copy: Copy, text: str) -> None:
        self.shared.note_write(copy.lanes, copy.places, copy.size, text)
        for word in range(0, copy.size, 4):
            values = np.zeros(len(copy.lanes), np.uint32)
            read = copy.wanted > 0
            values[read] = self.memory.load(copy.addresses[read] + np.uint64(word), 4)
            self.shared.words[4][(copy.places + word) // 4] = values
