"""PTX text as kernels: instructions with their operands, where branches lead, and where parameters and arrays lie."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_KERNEL = re.compile(r"^(?:\.(?:visible|weak)\s+)?\.entry\s+(\w+)\s*\((.*?)\)([^{;]*)\{\n(.*?)^\}", re.S | re.M)
_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{]+")


class PtxError(Exception):
    """The code is not understood, or does what the machine would not allow."""


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: list[str]
    guard: str | None  # the predicate's register
    negated: bool
    text: str

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass
class Kernel:
    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)  # of each prefix, or name: bytes; 0 of a predicate
    symbols: dict[str, int] = field(default_factory=dict)  # parameters and shared arrays: where they begin
    parameters: list[tuple[int, int]] = field(default_factory=list)  # offset and bytes of each
    shared_bytes: int = 0  # of arrays whose size the code tells


class Module:
    """A PTX file. Its kernels, by their mangled names, are read when they are asked for: few of many run."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*", "", text)
        self.dynamic = re.findall(r"^\.extern\s+\.shared\s.*?(\w+)\[\]", text, re.M)
        self.texts = {match[1]: match for match in _KERNEL.finditer(text)}
        self.read: dict[str, Kernel] = {}

    def kernel(self, name: str) -> Kernel:
        if name not in self.read:
            match = self.texts[name]
            self.read[name] = _kernel(name, match[2], match[4], self.dynamic)
        return self.read[name]


def _kernel(name: str, parameters: str, body: str, dynamic: list[str]) -> Kernel:
    kernel = Kernel(name)
    end = 0
    for align, kind, own, count in re.findall(
        r"\.param\s+(?:\.align\s+(\d+)\s+)?\.([a-z]\d+)\s+(?:\.ptr\s+(?:\.(?:global|shared|const|local)\s+)?(?:\.align\s+\d+\s+)?)?(\w+)(?:\[(\d+)\])?",
        parameters,
    ):
        size = SIZES[kind[1:]]
        begin = -(-end // int(align or size)) * int(align or size)
        end = begin + size * int(count or 1)
        kernel.symbols[own] = begin
        kernel.parameters.append((begin, end - begin))
    for statement in re.split(r";|(?<=:)\s*\n", body):
        # Braces of scopes; those of vectors stand within an instruction.
        _add(kernel, " ".join(statement.split()).lstrip("{} "))
    for own in dynamic:
        kernel.symbols[own] = kernel.shared_bytes
    return kernel


def _add(kernel: Kernel, statement: str) -> None:
    if statement.startswith((".pragma", ".loc", ".file")):
        return
    if label := re.match(r"^(\$\w+):$", statement):
        kernel.labels[label[1]] = len(kernel.instructions)
    elif declared := re.match(r"^\.reg\s+\.(\w+)\s+(.*)$", statement):
        size = 0 if declared[1] == "pred" else SIZES[declared[1].lstrip("busf")]
        for name in declared[2].split(","):
            kernel.registers[name.split("<")[0].strip()] = size
    elif array := re.match(r"^\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\]$", statement):
        begin = -(-kernel.shared_bytes // int(array[1])) * int(array[1])
        kernel.symbols[array[2]] = begin
        kernel.shared_bytes = begin + int(array[3])
    elif match := _INSTRUCTION.match(statement):
        operands = _OPERAND.findall(match[4])
        kernel.instructions.append(Instruction(match[3], operands, match[2], match[1] == "!", statement))
    elif statement:
        raise PtxError(f"statement: expected an instruction or a declaration, got {statement!r}")


def listed(operand: str) -> list[str]:
    """The registers of a vector, or the one."""
    return [name.strip() for name in operand.strip("{}").split(",")]
