"""Instructions that compute: of a lane from its own registers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from .conversions import decode_convert
from .parsing import Instruction, Kernel, listed
from .values import KINDS, Run, Value, each, reader, unknown, writer

# Words that change no result here: rounding to nearest, how subnormal numbers and NaN are treated.
IGNORED = {"rn", "ftz", "approx", "full", "noftz", "uni"}


def _divide(x: Value, y: Value) -> Value:
    """Towards zero, as C does; what a division by zero gives is nobody's business."""
    x, y = np.broadcast_arrays(x, y)
    y = np.where(y == 0, np.ones_like(y), y)
    if x.dtype.kind == "u":
        return x // y
    quotient = x // y
    return quotient + ((quotient < 0) & (quotient * y != x)).astype(x.dtype)


def _shift(left: bool) -> Callable[[Value, Value], Value]:
    def shift(x: Value, by: Value) -> Value:
        bits = 8 * x.dtype.itemsize
        over = by >= bits
        by = np.where(over, bits - 1, by).astype(x.dtype)
        if left:
            return np.where(over, x.dtype.type(0), x << by)
        return np.where(over & (x.dtype.kind == "u"), x.dtype.type(0), x >> by)

    return shift


def _high(x: Value, y: Value) -> Value:
    """The upper half of a product."""
    if x.dtype.itemsize < 8:
        wide = np.int64 if x.dtype.kind == "i" else np.uint64
        return (x.astype(wide) * y.astype(wide) >> wide(8 * x.dtype.itemsize)).astype(x.dtype)
    product = x.astype(object) * y.astype(object)
    return (product >> 64).astype(x.dtype) if x.ndim or y.ndim else x.dtype.type(int(product) >> 64)


def _smaller(x: Value, y: Value) -> Value:
    return np.fmin(x, y) if x.dtype.kind == "f" else np.minimum(x, y)


def _larger(x: Value, y: Value) -> Value:
    return np.fmax(x, y) if x.dtype.kind == "f" else np.maximum(x, y)


def _quotient(x: Value, y: Value) -> Value:
    return x / y if x.dtype.kind == "f" else _divide(x, y)


BINARY: dict[str, Callable[[Value, Value], Value]] = {
    "add": operator.add, "sub": operator.sub, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "min": _smaller, "max": _larger, "div": _quotient, "rem": lambda x, y: x - _divide(x, y) * y,
    "copysign": lambda x, y: np.copysign(y, x),
}  # fmt: skip
UNARY: dict[str, Callable[[Value], Value]] = {
    "not": operator.invert, "neg": lambda x: np.negative(x) if x.dtype.kind == "f" else x.dtype.type(0) - x,
    "abs": np.abs, "sqrt": np.sqrt, "rcp": lambda x: x.dtype.type(1) / x,
    "rsqrt": lambda x: x.dtype.type(1) / np.sqrt(x), "ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos,
}  # fmt: skip
ORDERED: dict[str, Callable[[Value, Value], Value]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip
LOGIC = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def _rounded(mode: str, exact: Value, kind: Any) -> Value:
    """A result that was found in a wider type, rounded towards zero, down or up."""
    near = exact.astype(kind)
    if mode == "rz":
        return np.where(np.abs(near) > np.abs(exact), np.nextafter(near, kind(0)), near)
    down = mode == "rm"
    beyond = near > exact if down else near < exact
    return np.where(beyond, np.nextafter(near, kind(-np.inf if down else np.inf)), near)


def decode(kernel: Kernel, instruction: Instruction) -> Run:
    """What an instruction that computes does to threads."""
    name, *modifiers = instruction.parts
    special = {"setp": _compare, "selp": _select, "mov": _move, "cvt": decode_convert, "cvta": _address, "bfi": _insert,
               "bfe": _extract, "prmt": _permute, "shf": _funnel}  # fmt: skip
    if name in special:
        return special[name](kernel, instruction)
    kind = KINDS.get(modifiers[-1]) if modifiers else None
    words = set(modifiers[:-1]) - IGNORED
    if kind is None:
        raise unknown(instruction)
    write = writer(kernel, instruction.operands[0])
    operands = [reader(kernel, operand, kind) for operand in instruction.operands[1:]]
    if name in UNARY and not words and len(operands) == 1:
        unary, only = UNARY[name], operands[0]
        return lambda t, lanes: write(t, lanes, unary(only(t, lanes)))
    if name in ("shl", "shr") and not words:
        shift, by = _shift(name == "shl"), reader(kernel, instruction.operands[2], np.uint32)
        return lambda t, lanes: write(t, lanes, shift(operands[0](t, lanes), by(t, lanes)))
    if name in BINARY and not words:
        binary, (first, second) = BINARY[name], operands
        return lambda t, lanes: write(t, lanes, binary(first(t, lanes), second(t, lanes)))
    if name in ("mul", "mad", "fma", "add", "sub"):
        if kind in (np.float32, np.float64, np.float16):
            return _floating(instruction, name, kind, words, operands, write)
        if name in ("mul", "mad"):
            return _product(kernel, instruction, kind, words, operands, write)
    raise unknown(instruction)


def _floating(instruction: Instruction, name: str, kind: Any, words: set[str], operands: list, write: Any) -> Run:
    mode = next(iter(words & {"rz", "rm", "rp"}), None)
    saturated = "sat" in words
    if words - {"rz", "rm", "rp", "sat"}:
        raise unknown(instruction)
    # A product of two floats is exact in double, so that only the sum is rounded twice.
    wide = np.float64 if kind != np.float64 else np.longdouble if mode else np.float64

    def run(t: Any, lanes: Any) -> None:
        if mode is None and name in ("mul", "add", "sub"):
            found = {"mul": operator.mul, **BINARY}[name](operands[0](t, lanes), operands[1](t, lanes))
        else:
            x, y, *rest = (operand(t, lanes).astype(wide) for operand in operands)
            exact = x * y if name in ("mul", "mad", "fma") else x + y if name == "add" else x - y
            if rest:
                exact = exact + rest[0]
            found = _rounded(mode, exact, kind) if mode else exact.astype(kind)
        write(t, lanes, np.clip(np.nan_to_num(found, nan=0), kind(0), kind(1)) if saturated else found)

    return run


def _product(kernel: Kernel, instruction: Instruction, kind: Any, words: set[str], operands: list, write: Any) -> Run:
    if len(words) != 1 or not words <= {"lo", "hi", "wide"}:
        raise unknown(instruction)
    (part,) = words
    if part == "wide":
        letter, bits = instruction.parts[-1][0], int(instruction.parts[-1][1:])
        kind = KINDS[f"{letter}{2 * bits}"]
    add = reader(kernel, instruction.operands[3], kind) if len(instruction.operands) == 4 else None

    def run(t: Any, lanes: Any) -> None:
        x, y = operands[0](t, lanes), operands[1](t, lanes)
        if part == "wide":
            x, y = x.astype(kind), y.astype(kind)
        found = _high(x, y) if part == "hi" else x * y
        write(t, lanes, found if add is None else found + add(t, lanes))

    return run


def _compare(kernel: Kernel, instruction: Instruction) -> Run:
    _, comparison, *modifiers, last = instruction.parts
    kind = KINDS.get(last)
    logic = [LOGIC[word] for word in modifiers if word in LOGIC]
    if kind is None or set(modifiers) - {"ftz", *LOGIC} or "|" in instruction.operands[0]:
        raise unknown(instruction)
    write = writer(kernel, instruction.operands[0])
    first, second = (reader(kernel, operand, kind) for operand in instruction.operands[1:3])
    third = reader(kernel, instruction.operands[3], np.bool_) if logic else None
    # Of floats: "lt" is false beside NaN, "ltu" true; so "ne" is what numpy says of "neu".
    unordered = comparison.endswith("u") and comparison[:-1] in ORDERED
    compare = ORDERED.get(comparison[:-1] if unordered else comparison)
    floating = last.startswith("f")
    if compare is None and not (floating and comparison in ("num", "nan")):
        raise unknown(instruction)

    def run(t: Any, lanes: Any) -> None:
        x, y = first(t, lanes), second(t, lanes)
        if floating:
            nan = (x != x) | (y != y)
            if compare is None:
                found = nan if comparison == "nan" else ~nan
            else:
                found = compare(x, y)
                found = found | nan if unordered else found & ~nan
        else:
            found = compare(x, y)
        write(t, lanes, logic[0](found, third(t, lanes)) if third else found)

    return run


def _select(kernel: Kernel, instruction: Instruction) -> Run:
    kind = KINDS[instruction.parts[-1]]
    write = writer(kernel, instruction.operands[0])
    first, second = (reader(kernel, operand, kind) for operand in instruction.operands[1:3])
    which = reader(kernel, instruction.operands[3], np.bool_)
    return lambda t, lanes: write(t, lanes, np.where(which(t, lanes), first(t, lanes), second(t, lanes))[()])


def _move(kernel: Kernel, instruction: Instruction) -> Run:
    to, what = instruction.operands
    kind = KINDS[instruction.parts[-1]]
    if to.startswith("{"):
        names = listed(to)
        part = KINDS[f"b{8 * np.dtype(kind).itemsize // len(names)}"]
        writes = [writer(kernel, name) for name in names]
        whole = reader(kernel, what, kind)

        def split(t: Any, lanes: Any) -> None:
            parts = each(t, lanes, whole(t, lanes)).view(part).reshape(-1, len(names))
            for i, write in enumerate(writes):
                write(t, lanes, parts[:, i].copy())

        return split
    write = writer(kernel, to)
    if what.startswith("{"):
        names = listed(what)
        part = KINDS[f"b{8 * np.dtype(kind).itemsize // len(names)}"]
        reads = [reader(kernel, name, part) for name in names]

        def join(t: Any, lanes: Any) -> None:
            write(t, lanes, np.stack([each(t, lanes, read(t, lanes)) for read in reads], 1).view(kind)[:, 0].copy())

        return join
    read = reader(kernel, what, kind)
    return lambda t, lanes: write(t, lanes, read(t, lanes).copy())


def _address(kernel: Kernel, instruction: Instruction) -> Run:
    """Generic addresses are global ones: no pointer to another space is made."""
    if "global" not in instruction.parts:
        raise unknown(instruction)
    write, read = writer(kernel, instruction.operands[0]), reader(kernel, instruction.operands[1], np.uint64)
    return lambda t, lanes: write(t, lanes, read(t, lanes).copy())


def _insert(kernel: Kernel, instruction: Instruction) -> Run:
    kind = KINDS[instruction.parts[-1]]
    write = writer(kernel, instruction.operands[0])
    field, into = (reader(kernel, operand, kind) for operand in instruction.operands[1:3])
    at, length = (int(operand, 0) for operand in instruction.operands[3:])
    mask = kind(((1 << length) - 1) << at & ((1 << 8 * np.dtype(kind).itemsize) - 1))
    return lambda t, lanes: write(t, lanes, (into(t, lanes) & ~mask) | (field(t, lanes) << kind(at) & mask))


def _extract(kernel: Kernel, instruction: Instruction) -> Run:
    kind = KINDS[instruction.parts[-1]]
    write, read = writer(kernel, instruction.operands[0]), reader(kernel, instruction.operands[1], kind)
    at, length = (int(operand, 0) for operand in instruction.operands[2:])
    up = kind(8 * np.dtype(kind).itemsize - at - length)
    down = kind(8 * np.dtype(kind).itemsize - length)
    return lambda t, lanes: write(t, lanes, read(t, lanes) << up >> down)


def _permute(kernel: Kernel, instruction: Instruction) -> Run:
    if instruction.parts != ["prmt", "b32"] or instruction.operands[3].startswith("%"):
        raise unknown(instruction)
    write = writer(kernel, instruction.operands[0])
    low, high = (reader(kernel, operand, np.uint32) for operand in instruction.operands[1:3])
    chosen = int(instruction.operands[3].rstrip("U"), 0)
    bytes_ = [chosen >> 4 * i & 15 for i in range(4)]
    if max(bytes_) > 7:
        raise unknown(instruction)

    def run(t: Any, lanes: Any) -> None:
        both = np.stack([each(t, lanes, low(t, lanes)), each(t, lanes, high(t, lanes))], 1).view(np.uint8)
        write(t, lanes, np.ascontiguousarray(both[:, bytes_]).view(np.uint32)[:, 0])

    return run


def _funnel(kernel: Kernel, instruction: Instruction) -> Run:
    _, side, mode, _ = instruction.parts
    if mode != "wrap":
        raise unknown(instruction)
    write = writer(kernel, instruction.operands[0])
    low, high, by = (reader(kernel, operand, np.uint32) for operand in instruction.operands[1:])

    def run(t: Any, lanes: Any) -> None:
        both = low(t, lanes).astype(np.uint64) | high(t, lanes).astype(np.uint64) << np.uint64(32)
        count = (by(t, lanes) & np.uint32(31)).astype(np.uint64)
        moved = both << count >> np.uint64(32) if side == "l" else both >> count
        write(t, lanes, moved.astype(np.uint32))

    return run
