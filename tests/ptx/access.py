"""Instructions that reach memory: loads, stores, atomic additions, asynchronous copies."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .parsing import Instruction, Kernel, PtxError, listed
from .values import KINDS, UNSIGNED, Run, as_kind, each, reader, unknown, writer

# How long a line is kept, and by whom it may be read: nothing that this memory knows.
HINTS = re.compile(r"nc|ca|cg|cs|lu|cv|wb|wt|volatile|relaxed|gpu|cta|sys|L[12]::\w+")


def address_of(kernel: Kernel, operand: str) -> Callable[[Any, Any], np.ndarray]:
    """[register or symbol + number] -> addresses of the lanes."""
    match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
    if match is None:
        raise PtxError(f"{operand}: expected [register+number]")
    # Addresses of shared memory may be in 32 bits.
    size = kernel.registers.get(match[1].rstrip("0123456789"), 8)
    base, more = reader(kernel, match[1], UNSIGNED[size]), np.int64(int(match[2] or 0))
    return lambda t, lanes: (each(t, lanes, base(t, lanes)).astype(np.int64) + more).view(np.uint64)


def decode(kernel: Kernel, instruction: Instruction) -> Run:
    name, *words = instruction.parts
    if name in ("ld", "st"):
        return _move(kernel, instruction, name == "ld", words)
    if name in ("atom", "red"):
        return _add(kernel, instruction, name == "atom", words)
    return _copy(kernel, instruction, words)


def _move(kernel: Kernel, instruction: Instruction, loads: bool, words: list[str]) -> Run:
    space = words[0]
    kind, count = KINDS.get(words[-1]), 1
    for word in words[1:-1]:
        if match := re.fullmatch(r"v([24])", word):
            count = int(match[1])
        elif not HINTS.fullmatch(word):
            raise unknown(instruction)
    registers, place = instruction.operands if loads else instruction.operands[::-1]
    if kind is None or space not in ("param", "global", "shared"):
        raise unknown(instruction)
    size = np.dtype(kind).itemsize
    address, text = address_of(kernel, place), instruction.text
    if loads:
        writes = [writer(kernel, name) for name in listed(registers)]
        loaders = {"param": _load_parameters, "global": _load_global, "shared": _load_shared}
        return loaders[space](address, writes, kind, size, count, text)
    reads = [reader(kernel, name, kind) for name in listed(registers)]
    if space == "param" or len(reads) != count:
        raise unknown(instruction)
    bits = UNSIGNED[size]

    def store(t: Any, lanes: Any) -> None:
        values = [as_kind(each(t, lanes, read(t, lanes)), bits) for read in reads]
        at = address(t, lanes)
        if space == "global":
            t.memory.check(at, size * count, text)
            t.counts.global_access(t.numbers(lanes), at, size * count, text)
            for i, value in enumerate(values):
                t.memory.store(at, size, value, i)
            return
        numbers = t.numbers(lanes)
        places = t.shared.places(numbers, at, size * count, text)
        t.shared.note_write(numbers, places, size * count, text)
        t.counts.shared_access(numbers, places, size * count, text)
        for i, value in enumerate(values):
            t.shared.words[size][places // size + i] = value

    return store


def _load_parameters(address: Any, writes: list, kind: Any, size: int, count: int, text: str) -> Run:
    def load(t: Any, lanes: Any) -> None:
        at = address(t, lanes)
        if (at % np.uint64(size)).any() or int(at.max()) + size * count > len(t.parameters):
            raise PtxError(f"{text}: expected {len(t.parameters)} bytes of parameters to suffice, got {at.max()}")
        if (at == at[0]).all():
            for value, write in zip(np.frombuffer(t.parameters, kind, count, int(at[0])), writes, strict=True):
                write(t, lanes, value)
            return
        places = at.astype(np.int64)[:, None] + np.arange(size * count)
        found = np.frombuffer(t.parameters, np.uint8)[places].view(kind)
        for i, write in enumerate(writes):
            write(t, lanes, found[:, i].copy())

    return load


def _load_global(address: Any, writes: list, kind: Any, size: int, count: int, text: str) -> Run:
    def load(t: Any, lanes: Any) -> None:
        at = address(t, lanes)
        t.memory.check(at, size * count, text)
        t.counts.global_access(t.numbers(lanes), at, size * count, text)
        found = [t.memory.load(at, size, i).view(kind) for i in range(count)]
        for value, write in zip(found, writes, strict=True):
            write(t, lanes, value)

    return load


def _load_shared(address: Any, writes: list, kind: Any, size: int, count: int, text: str) -> Run:
    def load(t: Any, lanes: Any) -> None:
        numbers = t.numbers(lanes)
        places = t.shared.places(numbers, address(t, lanes), size * count, text)
        t.shared.note_read(numbers, places, size * count, text)
        t.counts.shared_access(numbers, places, size * count, text)
        found = [t.shared.words[size][places // size + i].view(kind) for i in range(count)]
        for value, write in zip(found, writes, strict=True):
            write(t, lanes, value)

    return load


def _add(kernel: Kernel, instruction: Instruction, returns: bool, words: list[str]) -> Run:
    """Lanes that add to one place do so one after the other, in their order."""
    vector = next((int(word[1:]) for word in words if re.fullmatch(r"v[24]", word)), 1)
    kind = KINDS.get(words[-1])
    others = [word for word in words[:-1] if not HINTS.fullmatch(word) and not re.fullmatch(r"v[24]", word)]
    if kind is None or others != ["global", "add"] or (returns and vector > 1):
        raise unknown(instruction)
    size = np.dtype(kind).itemsize
    place, operand = instruction.operands[-2:]
    address, reads = address_of(kernel, place), [reader(kernel, name, kind) for name in listed(operand)]
    write = writer(kernel, instruction.operands[0]) if returns else None
    text = instruction.text

    def run(t: Any, lanes: Any) -> None:
        at = address(t, lanes)
        t.memory.check(at, size * vector, text)
        t.counts.global_access(t.numbers(lanes), at, size * vector, text)
        order = np.argsort(at, kind="stable")
        begins = np.flatnonzero(np.r_[True, at[order][1:] != at[order][:-1]])
        turn = np.arange(len(at)) - np.repeat(begins, np.diff(np.r_[begins, len(at)]))
        by_turn = order[np.argsort(turn, kind="stable")]
        ends = np.cumsum(np.bincount(turn))
        for i, read in enumerate(reads):
            values, before = each(t, lanes, read(t, lanes)), np.empty(len(at), kind)
            for chosen in np.split(by_turn, ends[:-1]):
                old = t.memory.load(at[chosen], size, i).view(kind)
                before[chosen] = old
                t.memory.store(at[chosen], size, (old + values[chosen]).view(UNSIGNED[size]), i)
            if write:
                write(t, lanes, before)

    return run


def _copy(kernel: Kernel, instruction: Instruction, words: list[str]) -> Run:
    text = instruction.text
    if words == ["async", "commit_group"]:
        return lambda t, lanes: t.copies.commit(t.numbers(lanes))
    if words == ["async", "wait_group"]:
        pending = int(instruction.operands[0])
        return lambda t, lanes: t.copies.wait(t.numbers(lanes), pending, text)
    if words == ["async", "wait_all"]:

        def wait_for_all(t: Any, lanes: Any) -> None:
            t.copies.commit(t.numbers(lanes))
            t.copies.wait(t.numbers(lanes), 0, text)

        return wait_for_all
    kept = [word for word in words if not HINTS.fullmatch(word) and word != "shared::cta"]
    if kept != ["async", "shared", "global"] and kept != ["async", "global"]:
        raise unknown(instruction)
    to, source = (address_of(kernel, operand) for operand in instruction.operands[:2])
    size = int(instruction.operands[2])
    wanted = reader(kernel, (instruction.operands[3:] or [str(size)])[0], np.int32)
    if size not in (4, 8, 16):
        raise unknown(instruction)

    def start(t: Any, lanes: Any) -> None:
        numbers = t.numbers(lanes)
        places = t.shared.places(numbers, to(t, lanes), size, text)
        addresses, taken = source(t, lanes), each(t, lanes, wanted(t, lanes))
        if not np.isin(taken, (0, size)).all():
            raise PtxError(f"{text}: expected all or none of {size} bytes to be read")
        read = taken > 0
        if read.any():
            t.memory.check(addresses[read], size, text)
            t.counts.global_access(numbers[read], addresses[read], size, text)
        t.counts.shared_access(numbers, places, size, text)
        t.copies.start(numbers, places, addresses, taken, size, text)

    return start
