"""Lists the launch parameters of all kernels, and what was measured to be better on an architecture.

`python -m fastreg_benchmarks.gpu tune` measures alternatives on a GPU and prints the lines to change here.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Architecture(NamedTuple):
    """A kind of GPU that kernels are compiled for and launched on.

    Attributes:
        name: Such as "sm_90" or "gfx942".
        lanes: Threads of a warp.
        multiprocessors: Number of multiprocessors, which run programs at the same time.
    """

    name: str
    lanes: int
    multiprocessors: int


class LaunchParameters(NamedTuple):
    """The sizes with which a kernel is launched.

    Attributes:
        block: Elements of a program, or the unit in the comment of the table.
        warps: Warps of a program.
        per_thread: Elements that a thread holds at a time.
        least: Least elements of a program; below `block`, small inputs are split among more programs.
        depth: Length that a program reads at a time of the dimension it sums over.
        stages: Triton's `num_stages`; 0 for Triton's default.
    """

    block: int
    warps: int = 4
    per_thread: int = 8
    least: int = 0
    depth: int = 0
    stages: int = 0

    def chunk(self, lanes: int) -> int:
        """Returns the elements that a program works on at a time, for a number of lanes in a warp."""
        return self.per_thread * self.warps * lanes

    def block_for(self, elements: int, architecture: Architecture) -> int:
        """Returns the elements of a program for an input, so that every multiprocessor has work."""
        block, wanted = self.block, PROGRAMS * architecture.multiprocessors
        least = max(self.least or self.block, self.chunk(architecture.lanes))
        while block // 2 >= least and block * wanted > elements:
            block //= 2
        return block

    @property
    def options(self) -> dict[str, Any]:
        """Options for Triton's launch; Triton 3.10 fuses multiply-adds only with `enable_fp_fusion`."""
        stages = {"num_stages": self.stages} if self.stages else {}
        return {"num_warps": self.warps, "enable_fp_fusion": True, **stages}


PROGRAMS = 16
"""Fewest programs for each multiprocessor before a program works on more than `least`."""

DEFAULTS: Mapping[str, LaunchParameters] = {
    # A thread holds one 128-bit access of 16-bit storage, or two of 32-bit storage.
    "step": LaunchParameters(4096),
    "norm": LaunchParameters(16384, least=4096),
    "clip_factor": LaunchParameters(8192, warps=16),  # block: partial results read at a time
    "unit_squares": LaunchParameters(1),  # block: units
    # block: positions, squared; depth: in float32. With fewer warps, registers do not suffice everywhere.
    "ghost_sums": LaunchParameters(64, warps=8, depth=32),
    "sample_sums": LaunchParameters(128, depth=16),  # block: features
    # With a fourth of the elements, the start of a program costs each 1.3 instructions more.
    "dropout": LaunchParameters(16384, per_thread=16, least=2048),
    "noise": LaunchParameters(16384, per_thread=16, least=2048),
    "adversarial_step": LaunchParameters(8192, per_thread=16),
    "adversarial_norm": LaunchParameters(8192, per_thread=16),
}
"""Parameters by the name of the kernel without `_kernel`. No GPU has measured them yet."""

CHUNKED = ("step", "norm", "dropout", "noise", "adversarial_step", "adversarial_norm")
"""Kernels whose programs work on a number of whole chunks."""

MEASURED: dict[str, dict[str, LaunchParameters]] = {}
"""Parameters measured to be faster than the defaults, by architecture and kernel."""

_tried: dict[str, LaunchParameters] = {}
_caches: list[Any] = []


def cache_launch(function: Callable[..., T]) -> Callable[..., T]:
    """Caches what a function makes of launch parameters and architectures, until `forget_launches`."""
    cached = functools.lru_cache(maxsize=256)(function)
    _caches.append(cached)
    return cached


def forget_launches() -> None:
    """Empties the caches of `cache_launch`, because parameters or the assumed architecture change."""
    for cache in _caches:
        cache.cache_clear()


def launch_parameters(kernel: str, architecture: Architecture) -> LaunchParameters:
    """Returns the parameters to launch a kernel with on an architecture."""
    chosen = _tried.get(kernel) or MEASURED.get(architecture.name, {}).get(kernel) or DEFAULTS[kernel]
    return _checked(kernel, chosen, architecture.lanes)


@functools.cache
def _checked(kernel: str, chosen: LaunchParameters, lanes: int) -> LaunchParameters:
    """Returns the parameters if they cover all elements.

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
    """Launches a kernel with other parameters in the block, on every architecture.

    Raises:
        KeyError: If there is no such kernel.
    """
    if kernel not in DEFAULTS:
        raise KeyError(f"no kernel {kernel!r}; there are {', '.join(DEFAULTS)}")
    before = dict(_tried)
    _try({**before, kernel: parameters})
    try:
        yield
    finally:
        _try(before)


def _try(parameters: dict[str, LaunchParameters]) -> None:
    global _tried
    _tried = parameters
    forget_launches()
