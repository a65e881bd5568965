"""Audits the machine code of every kernel, compiled ahead of time without a GPU.

A kernel that computes the right numbers can still load one element at a time, spill its registers or do
arithmetic on scalars in the wrong precision.  Tests of results do not notice that; the audit does.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource

from fastreg.cli import document
from fastreg.layerwise.table import aligned
from fastreg_kernels import step as step_kernels

from . import kernels, sass
from .kernels import Entry
from .stub import TARGETS

H200_LANES = 132 * 128 * 1.98e9
"""Instructions that an H200 can issue per second, counted once for each lane of a warp."""
H200_BYTES = 4.3e12
"""Bytes that a copy on an H200 moves per second."""
SHARE = 8
"""Fewest elements of a chunk that a thread works on."""


@dataclass
class Report:
    """Properties of a compiled kernel, read from its machine code."""

    entry: Entry
    target: str
    registers: int
    local: int  # bytes of stack and local memory
    spills: int  # bytes that spills move; on AMD the number of spilled registers
    shared: int
    instructions: float | None  # per element, with a share of those before the main loop
    loads: list[int]  # widths in bits of the main loop's global loads
    stores: list[int]
    narrow: int  # global accesses of the main loop below 128 bits
    moved: tuple[float, float] | None  # bytes read and written per element in the main loop
    in_flight: int | None = None  # loads that a thread issues before it uses the first of them
    scalar_arithmetic: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """The faults that the audit finds, in words."""
        faults = []
        if self.local:
            faults.append(f"{self.local} bytes of local memory")
        if self.spills:
            faults.append(f"{self.spills} spills")
        if self.narrow:
            faults.append(f"{self.narrow} accesses of the main loop are narrower than 128 bits")
        if self.entry.bytes and self.moved is None and self.target.startswith("sm"):
            faults.append("no main loop with 128-bit accesses")
        if self.moved and self.moved != (self.entry.reads, self.entry.writes):
            faults.append(
                f"moves {self.moved} bytes per element, documented ({self.entry.reads}, {self.entry.writes})"
            )
        if self.in_flight is not None and self.in_flight < self.entry.in_flight:
            faults.append(f"{self.in_flight} loads in flight, at least {self.entry.in_flight} are needed")
        if self.scalar_arithmetic:
            faults.append(f"arithmetic on scalars: {self.scalar_arithmetic}")
        over = self.target == "sm_90" and self.entry.budget and self.instructions
        if over and self.instructions > self.entry.budget:
            faults.append(f"{self.instructions:.1f} instructions per element, budget {self.entry.budget}")
        return faults

    @property
    def bound(self) -> tuple[str, float] | None:
        """The limit of the kernel on an H200 at perfect issue, and its bandwidth over that of a copy."""
        if not self.instructions:
            return None
        fraction = self.entry.bytes / H200_BYTES * H200_LANES / self.instructions
        return ("memory", 1.0) if fraction >= 1 else ("issue", fraction)


def signature(entry: Entry) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Returns types, constants and alignments for Triton's compiler; pointers are aligned to 16 bytes."""
    types: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    pointers: list[tuple[int, ...]] = []  # their paths within tuples

    def leaves(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            inner = tuple(leaves(item, (*path, i)) for i, item in enumerate(value))
            return type(value)(*inner) if hasattr(value, "_fields") else inner
        if isinstance(value, str):
            pointers.append(path)
            return value
        constants[path] = value.value if isinstance(value, tl.constexpr) else value
        return "constexpr"

    values = {**entry.arguments, **entry.constants}
    for position, name in enumerate(entry.kernel.arg_names):
        value = values[name]
        types[name] = value if isinstance(value, str) else leaves(value, (position,))
    plain = [
        (i,)
        for i, (name, value) in enumerate(types.items())
        if isinstance(value, str) and (value[0] == "*" or name in entry.multiples)
    ]
    return types, constants, {path: [["tt.divisibility", 16]] for path in (*plain, *pointers)}


def compile_entry(entry: Entry, target: str) -> Any:
    """Compiles an entry point for one of the `TARGETS`."""
    source = ASTSource(entry.kernel, *signature(entry))
    return triton.compile(source, target=TARGETS[target], options=entry.options)


def audit(entry: Entry, target: str) -> Report:
    """Compiles an entry point and reads its machine code."""
    compiled = compile_entry(entry, target)
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    report = read(entry, target, compiled)
    if entry.kernel is step_kernels.step_kernel:
        # Operations on blocks have type tensor<...>; a plain f32 or f64 is arithmetic on scalars, which the
        # host does more precisely: 1 - beta2 in float32 puts exp_avg_sq off by 1.3e-5.
        report.scalar_arithmetic = re.findall(
            r"arith\.(?:add|sub|mul|div)f [^:]*: f(?:32|64)", compiled.asm["ttir"]
        )
    return report


def _read_nvidia(entry: Entry, target: str, compiled: Any) -> Report:
    cubin = sass.read(compiled.asm["cubin"])
    code = cubin.instructions
    before, loop = sass.main_loop(code)
    spills = sum(i.width for i in code if i.kind in ("LDL", "STL"))
    report = Report(
        entry, target, cubin.registers, cubin.stack + cubin.local, spills, compiled.metadata.shared,
        None, [], [], 0, None,
    )  # fmt: skip
    if entry.in_flight:
        report.in_flight = sass.loads_in_flight(code)
    if loop and entry.bytes:
        loads, stores = sass.accesses(loop, "LDG"), sass.accesses(loop, "STG")
        report.loads, report.stores = (sorted({8 * width for width in kind}) for kind in (loads, stores))
        wide = Counter({width: count for width, count in (loads + stores).items() if width >= 16})
        per_turn = _elements(sum(width * count for width, count in wide.items()), entry)
        report.narrow = (loads + stores).total() - wide.total() - entry.gathers * per_turn
        loads = Counter({width: count for width, count in loads.items() if not entry.gathers or width >= 16})
        per_thread = entry.elements / (32 * entry.options["num_warps"])
        report.instructions = len(loop) / per_turn + len(before) / per_thread
        report.moved = tuple(sum(w * c for w, c in kind.items()) / per_turn for kind in (loads, stores))
    return report


def _elements(moved: int, entry: Entry) -> int:
    """Returns the elements of a thread in one turn of the main loop: `SHARE`, or a multiple if unrolled."""
    share = SHARE
    return share * max(1, round(moved / entry.bytes / share))


def _read_amd(entry: Entry, target: str, compiled: Any) -> Report:
    code = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:?\s+(\d+)", code).group(1))

    wide = re.findall(r"\b(?:global|flat|buffer)_(load|store)_dwordx4", code)
    report = Report(
        entry, target, number("vgpr_count"), number("private_segment_fixed_size"), number("vgpr_spill_count"),
        compiled.metadata.shared, None, *([128] * (kind in wide) for kind in ("load", "store")), 0, None,
    )  # fmt: skip
    expected = entry.bytes * SHARE // 16  # 128-bit accesses of a thread to its elements of one chunk
    report.narrow = max(0, expected - len(wide))
    return report


def row(report: Report) -> dict[str, Any]:
    """Returns a kernel's row of the table and of the JSON file."""
    bound, fraction = report.bound or (None, None)
    return {
        "kernel": report.entry.name, "target": report.target, "registers": report.registers,
        "spills": report.spills, "local": report.local, "shared": report.shared,
        "loads": report.loads, "stores": report.stores, "bytes": report.entry.bytes,
        "instructions": report.instructions, "in_flight": report.in_flight, "bound": bound,
        "of_copy": fraction, "faults": report.faults,
    }  # fmt: skip


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "kernel": lambda r: r["kernel"],
    "target": lambda r: r["target"],
    "regs": lambda r: str(r["registers"]),
    "spills": lambda r: str(r["spills"]),
    "local": lambda r: str(r["local"]),
    "shared": lambda r: str(r["shared"]),
    "loads": lambda r: "/".join(map(str, r["loads"])),
    "stores": lambda r: "/".join(map(str, r["stores"])),
    "bytes": lambda r: str(r["bytes"] or ""),
    "instr": lambda r: f"{r['instructions']:.1f}" if r["instructions"] else "",
    "instr/byte": lambda r: f"{r['instructions'] / r['bytes']:.2f}" if r["instructions"] else "",
    "bound on H200": lambda r: f"{r['bound']}, {r['of_copy']:.0%} of copy" if r["bound"] else "",
    "": lambda r: "; ".join(r["faults"]) or "ok",
}


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Returns rows as text with aligned columns."""
    return aligned([list(COLUMNS), *([cell(row) for cell in COLUMNS.values()] for row in rows)])


def main(arguments: list[str] | None = None) -> int:
    """Audits all entry points for some targets, by default all; returns 1 if there are faults, else 0."""
    parser = argparse.ArgumentParser(prog="python -m fastreg_benchmarks.audit", description=__doc__)
    parser.add_argument(
        "targets", nargs="*", default=list(TARGETS), metavar="TARGET", help=", ".join(TARGETS)
    )
    parser.add_argument("--only", default="", metavar="NAME", help="kernels whose names begin with this")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    if unknown := [target for target in options.targets if target not in TARGETS]:
        parser.error(f"unknown target {unknown[0]!r}; choose from {', '.join(TARGETS)}")
    entries = [
        (entry, target)
        for target in options.targets
        for entry in kernels.entries(TARGETS[target].warp_size, target)
    ]
    rows = [row(audit(entry, target)) for entry, target in entries if entry.name.startswith(options.only)]
    if not rows:
        names = dict.fromkeys(entry.name.rpartition(" ")[0] for entry, _ in entries)
        parser.error(f"no kernel begins with {options.only!r}; there are {', '.join(names)}")
    print(table(rows))
    if options.json:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        document.write(options.json, {"versions": versions, "rows": rows})
    return 1 if any(row["faults"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
