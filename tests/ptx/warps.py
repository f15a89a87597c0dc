"""Instructions of whole warps: shuffles, matrices from shared memory, products of matrices."""

from __future__ import annotations

from typing import Any

import numpy as np

from .access import address_of
from .conversions import from_bfloat16, from_half
from .parsing import Instruction, Kernel, listed
from .values import Run, each, reader, unknown, writer

NAMES = ("shfl", "ldmatrix", "mma", "bar.warp", "barrier.warp", "vote", "match", "redux", "activemask", "stmatrix")


def decode(kernel: Kernel, instruction: Instruction) -> Run:
    name = instruction.parts[0]
    if name == "shfl":
        return _shuffle(kernel, instruction)
    if name == "ldmatrix":
        return _load_matrices(kernel, instruction)
    if name == "mma":
        return _multiply(kernel, instruction)
    if name in ("bar", "barrier"):
        return lambda t, lanes: None
    raise unknown(instruction)


def _shuffle(kernel: Kernel, instruction: Instruction) -> Run:
    mode = instruction.parts[2]
    target, _, valid = instruction.operands[0].partition("|")
    if mode not in ("up", "down", "bfly", "idx"):
        raise unknown(instruction)
    write = writer(kernel, target)
    write_valid = writer(kernel, valid) if valid else None
    value, by, bounds, members = (reader(kernel, operand, np.uint32) for operand in instruction.operands[1:])

    def run(t: Any, lanes: Any) -> None:
        if (members(t, lanes) != 0xFFFFFFFF).any():
            raise unknown(instruction)
        values = each(t, lanes, value(t, lanes)).reshape(-1, 32)
        b = each(t, lanes, by(t, lanes)).astype(np.int64).reshape(-1, 32) & 31
        c = each(t, lanes, bounds(t, lanes)).astype(np.int64).reshape(-1, 32)
        lane = np.arange(32)
        segment, clamp = c >> 8 & 31, c & 31
        highest = (lane & segment) | (clamp & ~segment)
        lowest = lane & segment
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | (b & ~segment)}[mode]
        inside = source >= highest if mode == "up" else source <= highest
        found = np.take_along_axis(values, np.where(inside, source, lane) & 31, 1)
        write(t, lanes, found.ravel())
        if write_valid:
            write_valid(t, lanes, inside.ravel())

    return run


def _load_matrices(kernel: Kernel, instruction: Instruction) -> Run:
    if [part for part in instruction.parts if part not in ("trans", "shared::cta")] != [
        *("ldmatrix", "sync", "aligned", "m8n8", "x4"),
        *(["b16"] if "shared::cta" in instruction.parts else ["shared", "b16"]),
    ]:
        raise unknown(instruction)
    transposed = "trans" in instruction.parts
    writes = [writer(kernel, name) for name in listed(instruction.operands[0])]
    address, text = address_of(kernel, instruction.operands[1]), instruction.text

    def run(t: Any, lanes: Any) -> None:
        numbers = t.numbers(lanes)
        places = t.shared.places(numbers, address(t, lanes), 16, text)
        t.shared.note_read(numbers, places, 16, text)
        t.counts.shared_access(numbers, places, 16, text)
        # Lane 8 i + r names row r of matrix i.
        rows = t.shared.words[2][places.reshape(-1, 4, 8, 1) // 2 + np.arange(8)]
        if transposed:
            rows = rows.transpose(0, 1, 3, 2)
        pairs = np.ascontiguousarray(rows).view(np.uint32).reshape(-1, 4, 32)
        for i, write in enumerate(writes):
            write(t, lanes, pairs[:, i].ravel())

    return run


def _halves(convert: Any) -> Any:
    return lambda words: convert(words.view(np.uint16)).reshape(*words.shape, 2)


def _tf32(words: np.ndarray) -> np.ndarray:
    """The tensor cores leave the lower 13 bits out."""
    return (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None]


# By the types of the operands: depth of the product, and how a word is read.
OPERANDS = {
    ("m16n8k16", "f16"): (16, _halves(from_half)),
    ("m16n8k16", "bf16"): (16, _halves(from_bfloat16)),
    ("m16n8k8", "f16"): (8, _halves(from_half)),
    ("m16n8k8", "bf16"): (8, _halves(from_bfloat16)),
    ("m16n8k8", "tf32"): (8, _tf32),
    ("m16n8k4", "tf32"): (4, _tf32),
}


def _multiply(kernel: Kernel, instruction: Instruction) -> Run:
    """Of matrices whose elements are spread over the lanes as the PTX manual shows for each shape."""
    _, *how, shape, row, column, result, type_a, type_b, summed = instruction.parts
    if how != ["sync", "aligned"] or (row, column, result, summed) != ("row", "col", "f32", "f32") or type_a != type_b:
        raise unknown(instruction)
    if (shape, type_a) not in OPERANDS:
        raise unknown(instruction)
    depth, values = OPERANDS[shape, type_a]
    writes = [writer(kernel, name) for name in listed(instruction.operands[0])]
    words = [[reader(kernel, name, np.uint32) for name in listed(operand)] for operand in instruction.operands[1:3]]
    sums = [reader(kernel, name, np.float32) for name in listed(instruction.operands[3])]
    lane = np.arange(32)
    group, place = lane // 4, lane % 4

    def fragment(t: Any, lanes: Any, reads: list) -> np.ndarray:
        """[warp, lane, word, element of the word]"""
        return values(np.stack([each(t, lanes, read(t, lanes)) for read in reads], 1).reshape(-1, 32, len(reads)))

    def run(t: Any, lanes: Any) -> None:
        a, b = (fragment(t, lanes, reads) for reads in words)
        warps, each_word = len(a), a.shape[3]
        rows, columns = np.empty((warps, 16, depth), np.float32), np.empty((warps, depth, 8), np.float32)
        for word in range(a.shape[2]):
            for e in range(each_word):
                rows[:, group + 8 * (word & 1), place * each_word + e + 4 * each_word * (word >> 1)] = a[:, :, word, e]
        for word in range(b.shape[2]):
            for e in range(each_word):
                columns[:, place * each_word + e + 4 * each_word * word, group] = b[:, :, word, e]
        product = rows @ columns
        for i, (read, write) in enumerate(zip(sums, writes, strict=True)):
            found = product[:, group + 8 * (i >> 1), 2 * place + (i & 1)].ravel()
            write(t, lanes, each(t, lanes, read(t, lanes)) + found)

    return run
