"""A kernel entry point with its arguments and its budget, as the code audit reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastreg.runtime.launch_parameters import LaunchParameters


@dataclass(frozen=True)
class Entry:
    """A kernel entry point with the arguments it is compiled for.

    Args:
        name: What the table calls it.
        kernel: The `@triton.jit` function.
        arguments: Types of the run-time arguments by name; tuples of stages as they are.
        constants: Compile-time arguments.
        reads: Bytes read per element.
        writes: Bytes written per element.
        budget: Instructions per element allowed on sm_90; `None` for a kernel that runs once a step.
        gathers: Loads per element that are not wide: of what a unit shares, out of the cache.
        options: How it is compiled.
        multiples: Integers that are multiples of 16, which a launch sees to.
        in_flight: Loads that a thread must have issued before the first is used, on sm_90: of kernels with
            so few programs that nothing else hides how long a load takes.
        program: Elements that a program works on, where the launch says so at run time.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    reads: int = 0
    writes: int = 0
    budget: float | None = None
    gathers: float = 0
    options: dict[str, Any] = field(default_factory=lambda: LaunchParameters(0).options)
    multiples: tuple[str, ...] = ()
    in_flight: int = 0
    program: int = 0

    @property
    def elements(self) -> int:
        """That a program works on; one of a kernel without blocks has at least a chunk."""
        return self.program or self.constants.get("BLOCK", self.constants["CHUNK"])

    @property
    def bytes(self) -> int:
        return self.reads + self.writes
