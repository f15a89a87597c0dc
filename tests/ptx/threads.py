"""Blocks of threads at work: which lanes run which instruction, and where they wait for one another.

Lanes at one instruction run together, those that are furthest behind first, so that branches meet again. Collective
instructions want whole warps; a barrier waits until all threads of all blocks are there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import access, arithmetic, warps
from .copies import Copies
from .counts import NoCounts
from .memory import GlobalMemory, SharedMemory
from .parsing import Instruction, Kernel, PtxError
from .values import Run, reader

STRAIGHT, BRANCH, END, BARRIER, COLLECTIVE = range(5)


class Step(NamedTuple):
    kind: int
    run: Run | None
    guard: Any
    target: int
    instruction: Instruction


def decode(kernel: Kernel) -> list[Step]:
    return [_step(kernel, instruction) for instruction in kernel.instructions]


def _step(kernel: Kernel, instruction: Instruction) -> Step:
    opcode, guard = instruction.opcode, None
    if instruction.guard:
        guard = reader(kernel, ("!" if instruction.negated else "") + instruction.guard, np.bool_)
    if opcode in ("bra", "bra.uni"):
        return Step(BRANCH, None, guard, kernel.labels[instruction.operands[0]], instruction)
    if opcode in ("ret", "exit"):
        return Step(END, None, guard, 0, instruction)
    if opcode in ("bar.sync", "barrier.sync", "barrier.sync.aligned") and instruction.operands == ["0"]:
        return Step(BARRIER, None, guard, 0, instruction)
    if opcode.startswith(warps.NAMES):
        return Step(COLLECTIVE, warps.decode(kernel, instruction), guard, 0, instruction)
    if opcode.split(".")[0] in ("membar", "fence"):
        return Step(STRAIGHT, lambda t, lanes: None, guard, 0, instruction)
    if opcode.split(".")[0] in ("ld", "st", "atom", "red", "cp"):
        return Step(STRAIGHT, access.decode(kernel, instruction), guard, 0, instruction)
    return Step(STRAIGHT, arithmetic.decode(kernel, instruction), guard, 0, instruction)


class Threads:
    """Some blocks of a grid, side by side."""

    def __init__(
        self, steps: list[Step], first_block: int, blocks: int, grid: int, threads: int, parameters: bytes,
        shared_bytes: int, memory: GlobalMemory, counts: NoCounts,
    ) -> None:  # fmt: skip
        self.steps, self.count = steps, blocks * threads
        self.threads_of_block = threads
        self.all = np.arange(self.count)
        self.memory, self.parameters, self.counts = memory, parameters, counts
        self.shared = SharedMemory(shared_bytes, blocks, threads)
        self.copies = Copies(self.count, memory, self.shared)
        self.registers: dict[str, Any] = {
            "%tid.x": (self.all % threads).astype(np.uint32),
            "%ctaid.x": (self.all // threads + first_block).astype(np.uint32),
            "%ntid.x": np.uint32(threads),
            "%nctaid.x": np.uint32(grid),
        }
        # By the instruction that they are at: lanes in order, or None for all of them.
        self.ready: dict[int, Any] = {0: None}
        self.at_barrier: dict[int, np.ndarray] = {}
        self.incomplete: dict[int, np.ndarray] = {}  # at a collective instruction, without some of their warps
        self.ended = 0
        self.issued = np.zeros(-(-self.count // 32), np.int64)  # by each warp, where anybody counts

    def numbers(self, lanes: Any) -> np.ndarray:
        return self.all if lanes is None else lanes

    def run(self) -> int:
        """Run them to their ends; return how much the warp issues that issues most."""
        with np.errstate(all="ignore"):
            while True:
                while self.ready:
                    at = min(self.ready)
                    lanes = self.ready.pop(at)
                    self._advance(at, lanes, min(self.ready, default=len(self.steps)))
                if self.incomplete:
                    where = self.steps[min(self.incomplete)].instruction
                    raise PtxError(f"{where.text}: expected whole warps, but some of their threads are elsewhere")
                if not self.at_barrier:
                    break
                self._pass_barrier()
        if self.ended != self.count:
            raise PtxError(f"kernel: expected all {self.count} threads to end, got {self.ended}")
        return int(self.issued.max())

    def _arrive(self, where: dict[int, Any], at: int, lanes: Any) -> None:
        before = where.get(at)
        if before is not None:
            lanes = np.sort(np.concatenate([before, self.numbers(lanes)]))
        where[at] = None if lanes is not None and len(lanes) == self.count else lanes

    def _advance(self, at: int, lanes: Any, limit: int) -> None:
        """Run these lanes until others stand where they are, or they part."""
        counts = self.counts
        if counts.active:
            warps = np.unique(self.numbers(lanes) >> 5)
        while at < limit:
            kind, run, guard, target, instruction = self.steps[at]
            if kind == COLLECTIVE and (lanes is not None or self.incomplete):
                lanes = self._whole_warps(at, lanes)
                if lanes is not None and not len(lanes):
                    return
                if counts.active:
                    warps = np.unique(self.numbers(lanes) >> 5)
            if counts.active:
                counts.issue(instruction.opcode, len(warps))
                self.issued[warps] += 1
            chosen, others = lanes, None
            if guard is not None:
                chosen, others = self._divide(guard(self, lanes), lanes)
            nobody = chosen is not None and not len(chosen)
            if kind == STRAIGHT or kind == COLLECTIVE:
                if kind == COLLECTIVE and guard is not None and len(self._parts_of_warps(self.numbers(chosen))):
                    raise PtxError(f"{instruction.text}: expected whole warps, but some of their threads are left out")
                if not nobody:
                    run(self, chosen)
                at += 1
                continue
            if nobody:
                at += 1
                continue
            if others is not None:
                self._arrive(self.ready, at + 1, others)
            if kind == BRANCH:
                self._arrive(self.ready, target, chosen)
            elif kind == END:
                self.ended += len(self.numbers(chosen))
            else:
                self._arrive(self.at_barrier, at, self.numbers(chosen))
            return
        self._arrive(self.ready, at, lanes)

    def _divide(self, condition: Any, lanes: Any) -> tuple[Any, Any]:
        """Lanes for which it holds, and the others: None of the latter means that there are none."""
        if condition.ndim == 0:
            return (lanes, None) if condition else (self.all[:0], lanes)
        if condition.all():
            return lanes, None
        numbers = self.numbers(lanes)
        return numbers[condition], numbers[~condition]

    def _parts_of_warps(self, lanes: np.ndarray) -> np.ndarray:
        return lanes[np.bincount(lanes >> 5, minlength=1)[lanes >> 5] != 32]

    def _whole_warps(self, at: int, lanes: Any) -> Any:
        """Lanes whose warps are complete; the others wait for the rest of theirs."""
        lanes = self.numbers(lanes)
        if at in self.incomplete:
            lanes = np.sort(np.concatenate([self.incomplete.pop(at), lanes]))
        parts = self._parts_of_warps(lanes)
        if len(parts):
            self.incomplete[at] = parts
            lanes = np.setdiff1d(lanes, parts, assume_unique=True)
        return None if len(lanes) == self.count else lanes

    def _pass_barrier(self) -> None:
        waiting, self.at_barrier = self.at_barrier, {}
        all_waiting = np.concatenate([self.numbers(lanes) for lanes in waiting.values()])
        of_block = np.bincount(all_waiting // self.threads_of_block)
        if ((of_block != 0) & (of_block != self.threads_of_block)).any():
            where = self.steps[min(waiting)].instruction
            raise PtxError(f"{where.text}: expected all threads of a block, but some have ended")
        self.shared.barrier()
        for at, lanes in waiting.items():
            numbers = self.numbers(lanes)
            if len(self._parts_of_warps(numbers)):
                raise PtxError(f"{self.steps[at].instruction.text}: expected whole warps at one barrier")
            self._arrive(self.ready, at + 1, lanes)
