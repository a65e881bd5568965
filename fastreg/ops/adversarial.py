"""What moves adversarial inputs, by the backend's way: kernels, the compiled reference or the reference.

`move` takes a step, `norms` measures what it needs to know of every sample before.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import adversarial as reference
from ..reference.step import compute_dtype
from ..runtime import backend
from ..runtime.compile_ahead import compile_ahead
from ..runtime.device import aligned, architecture, launch, triton_dtype
from ..runtime.launch_parameters import LaunchParameters, launch_parameters

EXAMPLE = 773, 1361
"""Samples and elements that the reference is compiled with: equal to no other size, and long enough for
Inductor to use all threads."""


class Bounds(NamedTuple):
    """What elements must lie between: element i of a sample between those at i / spatial % len(lower)."""

    lower: Tensor  # 0-d, or `[channels]`
    upper: Tensor  # likewise
    spatial: int  # elements that follow each other in a channel

    def spread(self, elements: int) -> tuple[Tensor, Tensor]:
        """Those of each element of a sample."""
        if not self.lower.dim():
            return self.lower, self.upper
        index = torch.arange(elements, device=self.lower.device) // self.spatial % len(self.lower)
        return self.lower[index], self.upper[index]


class Given(NamedTuple):
    """What moves, where from, and along what; all contiguous.

    Args:
        x: `[samples, elements]`, where the samples are.
        gradient: Of the same shape; `None` for noise, and where there is no step.
        clean: Of the same shape, the centres of the balls; x by default.
        numbers: `[samples or 1, 3]` in compute precision: radius, size of the step, what a projection keeps.
        kind: The direction, see `reference.adversarial.direction`; `"none"` for no step.
        peaks: int64 `[samples]`, for the direction `"peak"`.
        seed: int64, 0-d, for noise.
    """

    x: Tensor
    gradient: Tensor | None
    clean: Tensor | None
    numbers: Tensor | None
    kind: str
    peaks: Tensor | None = None
    seed: Tensor | None = None


def move(given: Given, ball: str, bounds: Bounds | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`reference.adversarial.step`.

    Args:
        given: What moves.
        ball: See `reference.adversarial.project`.
        bounds: Of the elements, if there are any.
        dtype: Of the result.

    Returns:
        The result `[samples, elements]`, and the same in compute precision: itself where that is its dtype.
    """
    x = given.x
    name = backend.resolve(x.device, x.numel())
    if name == "triton":
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        compute = compute_dtype(dtype)
        master = out if compute == dtype else torch.empty(x.shape, dtype=compute, device=x.device)
        launch_step(given, ball, bounds, out, None if master is out else master)
        return out, master
    lower, upper = (None, None) if bounds is None else bounds.spread(x.shape[1])
    tensors = [*_tensors(given), lower, upper]
    found = _by_reference(_step, tensors, (given.kind, ball, dtype), given.seed, name)
    return (found[0], found[0]) if found[1].dtype == dtype else found


def norms(given: Given, order: int) -> Tensor:
    """`reference.adversarial.size`: `[samples, 1]`, in compute precision.

    Args:
        given: What is measured: the direction, or with `clean` the perturbation.
        order: 1 or 2.
    """
    x = given.x
    name = backend.resolve(x.device, x.numel())
    if name == "triton":
        block = launch_parameters("adversarial_norm", architecture(x.device)).block
        partial = torch.empty(len(x), blocks_of(x, block), dtype=torch.float64, device=x.device)
        launch_norm(given, order, partial)
        found = partial.sum(1, keepdim=True)
        return (found.sqrt() if order == 2 else found).to(compute_dtype(x.dtype))
    return _by_reference(_size, _tensors(given), (given.kind, order), given.seed, name)


# The reference ----------------------------------------------------------------------------------------------


def _tensors(given: Given) -> list[Tensor | None]:
    numbers = given.numbers
    if numbers is not None:
        numbers = numbers.expand(len(given.x), -1)
    return [given.x, given.gradient, given.clean, numbers, given.peaks]


def _step(tensors: list[Any], seed: Any, kind: str, ball: str, dtype: torch.dtype) -> Any:
    x, gradient, clean, numbers, peaks, lower, upper = tensors
    return reference.step(x, gradient, clean, numbers, peaks, lower, upper, seed, kind, ball, dtype)


def _size(tensors: list[Any], seed: Any, kind: str, order: int) -> Any:
    x, gradient, clean, numbers, _ = tensors
    return reference.size(x, gradient, clean, numbers, seed, kind, order)


def _by_reference(
    body: Callable[..., Any], tensors: list[Tensor | None], options: tuple[Any, ...], seed: Tensor | None,
    name: str,
) -> Any:  # fmt: skip
    x = tensors[0]
    assert x is not None
    if seed is None:
        seed = torch.zeros((), dtype=torch.int64, device=x.device)
    if name == "compiled" and min(x.shape) > 1:
        kinds = tuple(None if t is None else (t.dtype, t.dim()) for t in tensors)
        try:
            fused = _compiled(body, kinds, options, x.device, torch.get_num_threads())
        except Exception as error:
            backend.cannot_compile(error)
        else:
            return fused([t.contiguous() for t in tensors if t is not None], seed)
    known = int(seed) if seed.device.type == "cpu" else seed  # integers are worked on faster
    return body(tensors, known, *options)


@functools.cache
def _compiled(
    body: Callable[..., Any], kinds: tuple[Any, ...], options: tuple[Any, ...], device: torch.device,
    threads: int,
) -> Callable[..., Any]:  # fmt: skip
    """`_step` or `_size` compiled for these tensors of any size.

    Args:
        body: Which of both.
        kinds: dtype and dimensions of each tensor; `None` for those that are not there.
        options: What the body takes behind the seed.
        device: Where all are.
        threads: `torch.get_num_threads()`, which Inductor builds in.
    """

    def fused(held: list[Tensor], seed: Tensor) -> Any:
        left = iter(held)
        return body([kind if kind is None else next(left) for kind in kinds], seed, *options)

    samples, elements = EXAMPLE
    # Of x, gradient, clean, numbers, peaks, lower and upper.
    sizes = [(samples, elements)] * 3 + [(samples, 3), (samples,), (elements,), (elements,)]
    held = [
        torch.zeros(size if kind[1] else (), dtype=kind[0], device=device)
        for kind, size in zip(kinds, sizes, strict=False)
        if kind is not None
    ]
    return compile_ahead(fused, (held, torch.zeros((), dtype=torch.int64, device=device)))


# The kernels ------------------------------------------------------------------------------------------------


def launch_step(given: Given, ball: str, bounds: Bounds | None, out: Tensor, master: Tensor | None) -> None:
    """Fill `out`, and `master` if there is one, with the kernel; for arguments see `move`."""
    kernels = importlib.import_module("fastreg_kernels.adversarial")
    target = architecture(out.device)
    chosen = launch_parameters("adversarial_step", target)
    (samples, elements), blocks = out.shape, blocks_of(out, chosen.block)
    lower, upper, spatial = (None, None, 1) if bounds is None else bounds
    launch(
        kernels.adversarial_step_kernel, samples * blocks, out.device,
        *_inputs(given), out, master, given.numbers, given.peaks, lower, upper, given.seed,
        _row_numbers(given), elements, blocks, spatial, 1 if lower is None else lower.numel(),
        BALL=ball, BOUNDS="none" if lower is None else "table" if lower.dim() else "scalar",
        **constants(given, out.dtype, chosen, target.lanes), **chosen.options,
    )  # fmt: skip


def launch_norm(given: Given, order: int, partial: Tensor) -> None:
    """Fill `partial`, `[samples, programs a sample]` in double, with the kernel."""
    kernels = importlib.import_module("fastreg_kernels.adversarial")
    target = architecture(partial.device)
    chosen = launch_parameters("adversarial_norm", target)
    (samples, elements), blocks = given.x.shape, partial.shape[1]
    launch(
        kernels.adversarial_norm_kernel, samples * blocks, partial.device,
        *_inputs(given), partial, given.numbers, given.seed, _row_numbers(given), elements, blocks,
        SQUARES=order == 2, **constants(given, given.x.dtype, chosen, target.lanes), **chosen.options,
    )  # fmt: skip


def blocks_of(x: Tensor, block: int) -> int:
    """Programs for each sample of `[samples, elements]`, where a program works on so many elements."""
    return -(-(x.shape[1] + 15) // block)


def _inputs(given: Given) -> list[Tensor | None]:
    return [t if t is None else aligned(t) for t in (given.x, given.gradient, given.clean)]


def _row_numbers(given: Given) -> int:
    """How far the numbers of two samples lie apart."""
    return 3 if given.numbers is not None and len(given.numbers) > 1 else 0


def constants(given: Given, dtype: torch.dtype, chosen: LaunchParameters, lanes: int) -> dict[str, Any]:
    """The compile-time arguments of both kernels, for a result of a dtype and warps of so many lanes."""
    return {
        "KIND": given.kind,
        "COMPUTE": triton_dtype(compute_dtype(dtype)),
        "VECTOR": 8 if dtype.itemsize == 2 else 4,
        "BLOCK": chosen.block,
        "CHUNK": chosen.chunk(lanes),
    }
