"""Describes a kernel entry point for the code audit: its arguments and its budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastreg.runtime.launch_parameters import LaunchParameters


@dataclass(frozen=True)
class Entry:
    """A kernel entry point with the arguments for which it is compiled, and its limits.

    Args:
        name: Name in the table.
        kernel: The `@triton.jit` function.
        arguments: Types of the run-time arguments by name; tuples of stages stand for themselves.
        constants: Compile-time arguments.
        reads: Bytes read per element.
        writes: Bytes written per element.
        budget: Instructions per element allowed on sm_90; `None` for a kernel that runs once a step.
        gathers: Narrow loads per element, of values that the elements of a unit share; the cache holds them.
        options: Triton's options of a launch.
        multiples: Names of integer arguments that are multiples of 16 in every launch.
        in_flight: Fewest loads that a thread must issue before it uses the first, on NVIDIA GPUs.  It is for
            kernels with so few programs that nothing else hides the latency of a load.
        program: Elements that a program works on, if the launch passes them at run time.
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
        """The elements of a program: the block, or, in a kernel without blocks, at least a chunk."""
        return self.program or self.constants.get("BLOCK", self.constants["CHUNK"])

    @property
    def bytes(self) -> int:
        return self.reads + self.writes
