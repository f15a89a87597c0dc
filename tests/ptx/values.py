"""Types and operands: how registers are read as numbers, and written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .parsing import Instruction, Kernel, PtxError

# A value is an array with one element for each lane, or a single one that all share.
Value = Any
Read = Callable[[Any, Any], Value]  # (threads, lanes) -> what these lanes have; None stands for all lanes
Run = Callable[[Any, Any], None]

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
KINDS: dict[str, Any] = {
    "pred": np.bool_, "f16": np.float16, "f32": np.float32, "f64": np.float64,
    **{f"{letter}{8 * size}": kind for letter in "bu" for size, kind in UNSIGNED.items()},
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
}  # fmt: skip
SPECIAL = ("%tid.x", "%ctaid.x", "%ntid.x", "%nctaid.x")


def unknown(instruction: Instruction) -> PtxError:
    return PtxError(f"instruction: expected one that the interpreter knows, got {instruction.text!r}")


def size_of(kernel: Kernel, register: str) -> int:
    """Bytes of a register; 0 of a predicate."""
    found = kernel.registers.get(register, kernel.registers.get(register.rstrip("0123456789")))
    if found is None:
        raise PtxError(f"{register}: expected a register that is declared in {kernel.name}")
    return found


def constant(kernel: Kernel, operand: str, kind: Any) -> Value:
    if match := re.fullmatch(r"0([fd])([0-9a-fA-F]+)", operand):
        bits: Value = np.uint32(int(match[2], 16)) if match[1] == "f" else np.uint64(int(match[2], 16))
        return bits.view(kind)
    if re.fullmatch(r"-?(\d+|0x[0-9a-fA-F]+)U?", operand):
        number = int(operand.rstrip("U"), 0)
    elif operand in kernel.symbols:
        number = kernel.symbols[operand]
    else:
        raise PtxError(f"{operand}: expected a register, a number or a symbol of {kernel.name}")
    if kind is np.bool_:
        return np.bool_(number)
    size = np.dtype(kind).itemsize
    return UNSIGNED[size](number & ((1 << 8 * size) - 1)).view(kind)


def as_kind(value: Value, kind: Any) -> Value:
    """The bits of a register read as a type: the lower ones, if that is smaller."""
    size = np.dtype(kind).itemsize
    if value.dtype.itemsize > size:
        value = value.astype(UNSIGNED[size])
    return value if value.dtype == kind else value.view(kind)


def reader(kernel: Kernel, operand: str, kind: Any) -> Read:
    if operand.startswith("!"):
        inner = reader(kernel, operand[1:], kind)
        return lambda threads, lanes: ~inner(threads, lanes)
    if not operand.startswith("%"):
        fixed = constant(kernel, operand, kind)
        return lambda threads, lanes: fixed

    def read(threads: Any, lanes: Any) -> Value:
        value = threads.registers.get(operand)
        if value is None:
            raise PtxError(f"{operand}: expected a register that has been written, in {kernel.name}")
        if lanes is not None and value.ndim:
            value = value[lanes]
        return value if value.dtype == kind else as_kind(value, kind)

    return read


def writer(kernel: Kernel, register: str) -> Callable[[Any, Any, Value], None]:
    if register == "_":
        return lambda threads, lanes, value: None
    size = size_of(kernel, register)
    stored = UNSIGNED[size] if size else np.bool_

    def write(threads: Any, lanes: Any, value: Value) -> None:
        if value.dtype != stored:
            if value.dtype.itemsize < size:  # extended by its sign, if it has one
                value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{size}")
            value = value.view(stored)
        if lanes is None:
            threads.registers[register] = value
            return
        before = threads.registers.get(register)
        if before is None:
            before = np.zeros(threads.count, stored)
        elif before.ndim == 0:
            before = np.full(threads.count, before)
        threads.registers[register] = before
        before[lanes] = value

    return write


def each(threads: Any, lanes: Any, value: Value) -> np.ndarray:
    """A value as an array of its own, with one element for each lane."""
    count = threads.count if lanes is None else len(lanes)
    return np.ascontiguousarray(np.broadcast_to(value, (count,)))
