"""How every kernel is launched: one table, with a line for each architecture that wants something else.

`python -m fastreg_benchmarks.gpu tune` measures alternatives on a GPU and prints the lines to change here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Architecture(NamedTuple):
    """What kernels are compiled for and launched on.

    Attributes:
        name: Such as "sm_90" or "gfx942".
        lanes: Threads of a warp.
        multiprocessors: How many of them run programs at the same time.
    """

    name: str
    lanes: int
    multiprocessors: int


class LaunchParameters(NamedTuple):
    """How a kernel is launched.

    Attributes:
        block: What a program works on: elements, or what the comment in the table says.
        warps: Of a program.
        per_thread: Elements that a thread holds at a time.
        least: What a program works on at least. Below `block`, small inputs are split among more programs.
        depth: How much of the dimension that is summed over a program reads at a time.
        stages: Triton's `num_stages`; 0 for Triton's default.
    """

    block: int
    warps: int = 4
    per_thread: int = 8
    least: int = 0
    depth: int = 0
    stages: int = 0

    def chunk(self, lanes: int) -> int:
        """Elements that a program works on at a time, with warps of so many lanes."""
        return self.per_thread * self.warps * lanes

    def block_for(self, elements: int, architecture: Architecture) -> int:
        """Elements of a program for an input of so many, so that no multiprocessor is left without work."""
        block, wanted = self.block, PROGRAMS * architecture.multiprocessors
        least = max(self.least or self.block, self.chunk(architecture.lanes))
        while block // 2 >= least and block * wanted > elements:
            block //= 2
        return block

    @property
    def options(self) -> dict[str, Any]:
        """What the launch of a kernel is given; Triton 3.10 fuses multiply-adds only where it is told to."""
        stages = {"num_stages": self.stages} if self.stages else {}
        return {"num_warps": self.warps, "enable_fp_fusion": True, **stages}


PROGRAMS = 16
"""Programs for each multiprocessor that there must be before any works on more than `least`."""

DEFAULTS: Mapping[str, LaunchParameters] = {
    # A thread holds one 128-bit access of 16-bit storage, or two of 32-bit storage.
    "step": LaunchParameters(4096),
    "norm": LaunchParameters(16384, least=4096),
    "clip_factor": LaunchParameters(8192, warps=16),  # block: partial results read at a time
    "unit_squares": LaunchParameters(1),  # block: units
    "per_sample_norm": LaunchParameters(8192),
    "per_sample_factor": LaunchParameters(4096),  # block: partial results read at a time
    "per_sample_sum": LaunchParameters(1024),
    # block: positions, squared; depth: in float32. With fewer warps, registers do not suffice everywhere.
    "ghost_sums": LaunchParameters(64, warps=8, depth=32),
    "sample_sums": LaunchParameters(128, depth=16),  # block: features
    # With a fourth of the elements, what a program does before the first costs each 1.3 instructions more.
    "dropout": LaunchParameters(16384, per_thread=16, least=2048),
    "noise": LaunchParameters(16384, per_thread=16, least=2048),
    "adversarial_step": LaunchParameters(8192, per_thread=16),
    "adversarial_norm": LaunchParameters(8192, per_thread=16),
}
"""By the name of the kernel, less `_kernel`. No GPU has measured them yet."""

CHUNKED = ("step", "norm", "per_sample_norm", "dropout", "noise", "adversarial_step", "adversarial_norm")
"""Kernels whose programs work on a number of whole chunks."""

MEASURED: dict[str, dict[str, LaunchParameters]] = {}
"""What was measured to be faster than the defaults, by architecture and kernel."""

_tried: dict[str, LaunchParameters] = {}


def launch_parameters(kernel: str, architecture: Architecture) -> LaunchParameters:
    """How a kernel is launched on an architecture."""
    chosen = _tried.get(kernel) or MEASURED.get(architecture.name, {}).get(kernel) or DEFAULTS[kernel]
    return _checked(kernel, chosen, architecture.lanes)


@functools.cache
def _checked(kernel: str, chosen: LaunchParameters, lanes: int) -> LaunchParameters:
    """The parameters, if no element is left out with them.

    Raises:
        ValueError: If they are not powers of two, or a program works on less than a chunk.
    """
    sizes = {"block": chosen.block, "warps": chosen.warps, "per_thread": chosen.per_thread}
    sizes |= {name: size for name in ("least", "depth") if (size := getattr(chosen, name))}
    for name, size in sizes.items():
        if size < 1 or size & (size - 1):
            raise ValueError(f"launch parameters of {kernel!r}: {name} must be a power of two, got {size}")
    if kernel in CHUNKED and chosen.block < chosen.chunk(lanes):
        raise ValueError(
            f"launch parameters of {kernel!r}: block must be at least per_thread · warps · {lanes} = "
            f"{chosen.chunk(lanes)}, got {chosen.block}"
        )
    return chosen


@contextlib.contextmanager
def trying(kernel: str, parameters: LaunchParameters) -> Iterator[None]:
    """Within the block, the kernel is launched with these parameters everywhere.

    Raises:
        KeyError: If there is no such kernel.
    """
    if kernel not in DEFAULTS:
        raise KeyError(f"no kernel {kernel!r}; there are {', '.join(DEFAULTS)}")
    before = dict(_tried)
    _tried[kernel] = parameters
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)
