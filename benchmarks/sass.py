"""Reads NVIDIA's machine code (SASS): widths of accesses, local memory, and cost of the main loop."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s*/\* 0x", re.M)
_INSTRUCTION = re.compile(r"(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*)")


class Instruction(NamedTuple):
    address: int
    predicate: str
    name: str  # "LDG.E.128"
    operands: str

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes per thread of a memory access."""
        sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
        return next((sizes[part] for part in self.name.split(".")[1:] if part in sizes), 4)

    @property
    def target(self) -> int | None:
        """The address that a branch jumps to; `None` for other instructions."""
        match = re.search(r"0x([0-9a-f]+)", self.operands) if self.kind == "BRA" else None
        return int(match.group(1), 16) if match else None


class Cubin(NamedTuple):
    """A compiled kernel: its instructions, and the registers and memory of a thread."""

    instructions: list[Instruction]
    registers: int
    stack: int  # bytes of local memory, spills included
    local: int


def read(cubin: bytes) -> Cubin:
    """Disassembles a cubin with the cuobjdump that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        usage, code = (
            subprocess.run([_CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    finally:
        os.unlink(file.name)
    instructions = [
        Instruction(int(address, 16), *(part or "" for part in match.groups()))
        for address, text in _LINE.findall(code)
        if (match := _INSTRUCTION.fullmatch(text)) and not text.startswith("NOP")
    ]
    registers, stack, local = (
        int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK", "LOCAL")
    )
    return Cubin(instructions, registers, stack, local)


def main_loop(code: list[Instruction]) -> tuple[list[Instruction], list[Instruction]]:
    """Returns the instructions before the main loop, and those of one turn of it.

    The main loop is the one with the most 128-bit global accesses.  Both lists hold the `common_path`:
    out-of-line calls (for denormals) are not taken.  Without such a loop the first list is that of the
    whole kernel, and the second is empty.
    """
    wide_loops = [loop for loop in loops(code) if wide(loop)]
    if not wide_loops:
        return common_path(code), []
    loop = max(wide_loops, key=wide)
    before = [i for i in code if i.address < loop[0].address]
    return common_path(before), common_path(loop)


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Returns the instructions of each loop; those of an inner loop are in the list of the outer one, too."""
    return [
        [i for i in code if branch.target <= i.address <= branch.address]
        for branch in code
        if branch.target is not None and branch.target < branch.address
    ]


def common_path(code: list[Instruction]) -> list[Instruction]:
    """Returns the shortest of the forward paths through code that have the most 128-bit global accesses.

    A call counts as 1000 instructions, so paths avoid it.
    """
    index = {instruction.address: k for k, instruction in enumerate(code)}
    end = len(code)
    best: list[tuple[tuple[int, int], int]] = [((0, 0), end)] * (end + 1)
    for k in range(end - 1, -1, -1):
        here = code[k]
        forward = (
            index.get(here.target, end) if here.target is not None and here.target > here.address else None
        )
        conditional = bool(here.predicate) or re.search(r"\bU?P\d", here.operands) is not None
        ways = [k + 1] if here.kind != "BRA" or conditional or forward is None else []
        if here.kind == "EXIT" and not here.predicate:
            ways = [end]
        if forward is not None:
            ways.append(forward)
        cost = (wide([here]), -1 - (1000 if here.kind == "CALL" else 0))
        best[k] = max(((best[way][0][0] + cost[0], best[way][0][1] + cost[1]), way) for way in ways)
    path, k = [], 0
    while k < end:
        path.append(code[k])
        k = best[k][1]
    return path


def loads_in_flight(code: list[Instruction]) -> int:
    """Returns the most global loads that are issued before one of them is used, in the order of the code.

    Each branch starts the count anew.
    """
    outstanding: list[set[int]] = []
    most = 0
    for here in code:
        if here.kind == "BRA":
            outstanding = []
        named = [int(number) for number in re.findall(r"\bR(\d+)", here.operands)]
        outstanding = [registers for registers in outstanding if registers.isdisjoint(named)]
        if here.kind == "LDG":
            outstanding.append(set(range(named[0], named[0] + max(1, here.width // 4))))
            most = max(most, len(outstanding))
    return most


def wide(code: list[Instruction]) -> int:
    """Returns the number of global accesses of at least 128 bits."""
    return sum(i.kind in ("LDG", "STG") and i.width >= 16 for i in code)


def accesses(code: list[Instruction], *kinds: str) -> Counter[int]:
    """Returns the number of accesses of some kinds, such as "LDG", by width in bytes."""
    return Counter(i.width for i in code if i.kind in kinds)
