"""cvt: from one type to another, with 16-bit floats and the tensor cores' 19-bit one."""

from __future__ import annotations

from typing import Any

import numpy as np

from .parsing import Instruction, Kernel
from .values import KINDS, Run, Value, each, reader, unknown, writer

WHOLE = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
# Types of values that numpy has not, and in what registers they are.
BITS = {"bf16": np.uint16, "f16": np.uint16, "tf32": np.uint32}


def from_bfloat16(bits: Value) -> Value:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_half(bits: Value) -> Value:
    return bits.view(np.float16).astype(np.float32)


def to_bfloat16(x: Value) -> Value:
    """To nearest, ties to even."""
    bits = x.view(np.uint32)
    near = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), near.astype(np.uint16))


def to_half(x: Value) -> Value:
    return x.astype(np.float16).view(np.uint16)


def to_tf32(x: Value) -> Value:
    """To nearest, ties away from zero: 10 bits of fraction are left."""
    bits = x.view(np.uint32)
    return np.where(np.isfinite(x), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)


NARROW = {"bf16": to_bfloat16, "f16": to_half, "tf32": to_tf32}
WIDEN = {"bf16": from_bfloat16, "f16": from_half}


def convert(x: Value, to: Any, rounding: str | None) -> Value:
    """As C does, but that numbers which do not fit become the nearest that does, and NaN becomes 0."""
    if x.dtype.kind == "f" and rounding in WHOLE:
        x = WHOLE[rounding](x)
    if x.dtype.kind != "f" or np.dtype(to).kind == "f":
        return x.astype(to)
    limits = np.iinfo(to)
    wide = np.asarray(x, np.float64)
    inside = np.nan_to_num(np.where((wide < limits.max) & (wide > limits.min), wide, 0)).astype(to)
    found = np.where(wide >= limits.max, to(limits.max), np.where(wide <= limits.min, to(limits.min), inside))
    return found[()]


def decode_convert(kernel: Kernel, instruction: Instruction) -> Run:
    _, *words, to, of = instruction.parts
    write = writer(kernel, instruction.operands[0])
    if to in ("bf16x2", "f16x2") and of == "f32" and words == ["rn"]:
        narrow = NARROW[to[:-2]]
        high, low = (reader(kernel, operand, np.float32) for operand in instruction.operands[1:])

        def pack(t: Any, lanes: Any) -> None:
            upper, lower = (narrow(each(t, lanes, read(t, lanes))).astype(np.uint32) for read in (high, low))
            write(t, lanes, upper << np.uint32(16) | lower)

        return pack
    rounding = next((word for word in words if word in (*WHOLE, "rn", "rna")), None)
    saturated = "sat" in words
    if set(words) - {rounding, "sat", "ftz"} or len(instruction.operands) != 2:
        raise unknown(instruction)
    if (rounding == "rna") != (to == "tf32"):
        raise unknown(instruction)
    source, target = BITS.get(of, KINDS.get(of)), BITS.get(to, KINDS.get(to))
    if source is None or target is None:
        raise unknown(instruction)
    read = reader(kernel, instruction.operands[1], source)

    def run(t: Any, lanes: Any) -> None:
        x = read(t, lanes)
        if of in WIDEN:
            x = WIDEN[of](x)
        if to in NARROW:
            found = NARROW[to](x.astype(np.float32))
        else:
            found = convert(x, target, rounding)
            if saturated and to in ("f32", "f64"):
                found = np.clip(np.nan_to_num(found, nan=0), target(0), target(1))
        write(t, lanes, found)

    return run
