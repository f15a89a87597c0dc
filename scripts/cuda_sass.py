"""What stands in the machine code of kernels, and how many of their threads a multiprocessor holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from cuda_compile_check import Kernels, Tools, printed, short, used

ARCHS = ("8.0", "9.0")


class Processor(NamedTuple):
    """What a multiprocessor has for its blocks."""

    shared: int
    warps: int = 64
    blocks: int = 32
    registers_of_quarter: int = 16384

    def resident_threads(self, threads: int, registers: int, shared: int) -> int:
        """How many threads run at once: a warp is given registers by 256, a block shared memory by 128 bytes."""
        of_block = -(-threads // 32)
        warps = 4 * (self.registers_of_quarter // (-(-registers * 32 // 256) * 256))
        by_shared = self.shared // (-(-(shared + 1024) // 128) * 128)  # each block takes 1 KiB more
        return min(min(warps, self.warps) // of_block, by_shared, self.blocks) * threads


PROCESSORS = {"8.0": Processor(164 << 10), "9.0": Processor(228 << 10)}


class Machine(NamedTuple):
    """Of one kernel's machine code for one architecture, as it stands: how often each runs is not known from it."""

    instructions: int
    conversions64: int
    divisions: int
    reciprocals: int
    calls: int


_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)


def machine_code(file: Path, arch: str, tools: Tools) -> dict[str, Machine]:
    text = printed([tools.cuobjdump, "-sass", "-arch", f"sm_{arch.replace('.', '')}", str(file)])
    functions = re.split(r"^\s*Function : (\S+)\s*$", text, flags=re.M)
    names = printed([tools.demangle], input="\n".join(functions[1::2])).splitlines()
    found = {}
    for name, body in zip(names, functions[2::2], strict=True):
        opcodes = [opcode for opcode in _INSTRUCTION.findall(body) if opcode != "NOP"]

        def times(pattern: str, opcodes: list[str] = opcodes) -> int:
            return sum(bool(re.match(pattern, opcode)) for opcode in opcodes)

        found[short(name)] = Machine(
            len(opcodes),
            times(r"(I2F|F2I)\b.*[SU]64"),
            times(r"I2F\.(U32\.|U64\.)?RP"),
            times(r"MUFU\.RCP"),
            times("CALL"),
        )
    return found


class Built(NamedTuple):
    """Machine code and its needs, by architecture and by kernel."""

    code: dict[str, dict[str, Machine]]
    takes: Kernels

    @classmethod
    def of(cls, files: list[Path], tools: Tools) -> Built:
        code: dict[str, dict[str, Machine]] = {
            arch: {k: v for file in files for k, v in machine_code(file, arch, tools).items()} for arch in ARCHS
        }
        return cls(code, used([str(file) for file in files], tools.cuobjdump, tools.demangle))
