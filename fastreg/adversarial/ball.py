"""The ball around clean inputs: where steps along the gradient may lead, and where to start at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.adversarial import Bounds, Given, move, norms
from ..reference.adversarial import threshold
from ..reference.random import PhiloxPosition, uniform
from ..reference.step import compute_dtype

NORMS = ("linf", "l2", "l1")
TINY = 1e-12
"""Norms are divided by at least this."""
SLACK = 0.01
"""How far inputs may be out of bounds, as a share of their width: what rounding to bfloat16 does."""

Limit = float | Tensor
Range = tuple[Limit, Limit] | None


class Layout:
    """Samples as rows, whose elements are in the order in which they lie in memory.

    Args:
        x: `[samples, ...]`.
    """

    def __init__(self, x: Tensor) -> None:
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        dense = order[0] == 0 and x.permute(order).is_contiguous()
        self.order = order if dense else list(range(x.dim()))
        self.shape = [x.shape[dim] for dim in self.order]
        self.back = sorted(range(x.dim()), key=self.order.__getitem__)

    def rows(self, tensor: Tensor) -> Tensor:
        """`[samples, elements]`, contiguous."""
        return tensor.permute(self.order).contiguous().view(self.shape[0], math.prod(self.shape[1:]))

    def whole(self, rows: Tensor) -> Tensor:
        """Of the shape of x, with its strides."""
        return rows.view(self.shape).permute(self.back)


class Ball:
    """All inputs within a distance of clean ones, and within bounds.

    Args:
        x: The clean inputs, `[samples, ...]`, of a floating dtype.
        epsilon: The distance, ≥ 0, one for all or one for each sample.
        norm: By what it is measured, a name of `NORMS`.
        bounds: What every element must lie between, if anything: see `pgd`.
        steepest: Whether a step of `"l1"` moves a single element.

    Raises:
        TypeError: If x is not of a floating dtype, or bounds are not two.
        ValueError: For values out of range and shapes that do not fit.
    """

    def __init__(self, x: Tensor, epsilon: Limit, norm: str, bounds: Range, steepest: bool = False) -> None:
        if not x.is_floating_point():
            raise TypeError(
                f"x must be of a floating dtype, got {x.dtype}; scale images to [0, 1], and for token ids "
                "perturb the embeddings: fastreg.FGM(model)"
            )
        if not x.dim():
            raise ValueError("x must be [samples, ...], got a 0-d tensor; use x[None]")
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}")
        self.norm, self.steepest, self.dtype = norm, steepest and norm == "l1", x.dtype
        self.layout = Layout(x)
        self.clean = self.layout.rows(x.detach())
        self.epsilon = self.sizes("epsilon", epsilon)
        self._constant: tuple[Tensor, bool, Tensor] | None = None
        self.bounds = None if bounds is None else _checked(x, *_both(bounds), self.layout)

    def sizes(self, name: str, value: Limit) -> Tensor:
        """A number for each sample, or one for all, `[samples or 1, 1]`.

        Raises:
            ValueError: If one is not finite or below 0, or if there are not as many as samples.
        """
        compute, device = compute_dtype(self.dtype), self.clean.device
        if isinstance(value, Tensor):
            if value.numel() not in (1, len(self.clean)):
                raise ValueError(
                    f"{name} must be a number or [{len(self.clean)}], one for each sample, got shape "
                    f"{tuple(value.shape)}"
                )
            value = value.detach().to(device, compute).reshape(-1, 1)
            wrong = not _capturing(device) and not bool(((value >= 0) & (value < math.inf)).all())
        else:
            wrong = not 0 <= value < math.inf
            value = torch.full((1, 1), float(value), dtype=compute, device=device)
        if wrong:
            raise ValueError(f"{name} must be finite and >= 0, got {name}={value.flatten().tolist()}")
        return value

    def step(
        self, point: Tensor | None, gradient: Tensor, size: Tensor, ascend: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Move along the gradient, and back into the ball.

        Args:
            point: Where the samples are, `[samples, elements]`; at the clean inputs by default, from where a
                step of at most epsilon stays in the ball.
            gradient: `[samples, ...]`.
            size: The length of the step, `[samples or 1, 1]`.
            ascend: Which way.

        Returns:
            Where they are then, in the dtype of the clean inputs and in compute precision.
        """
        gradient = self.layout.rows(gradient)
        kind, peaks = ("sign" if self.norm == "linf" else "peak" if self.steepest else "scaled"), None
        if kind == "peak":
            peaks = torch.where(gradient.isfinite(), gradient.abs(), 0).argmax(1)
        elif kind == "scaled":
            size = size / self._norms(Given(self.clean, gradient, None, None, kind)).clamp(min=TINY)
        numbers = self._signed(size, ascend)
        if point is None:
            given = Given(self.clean, gradient, None, numbers, kind, peaks)
            return move(given, "none", self.bounds, self.dtype)
        return self._project(Given(point, gradient, self.clean, numbers, kind, peaks))

    def _signed(self, size: Tensor, ascend: bool) -> Tensor:
        """The numbers of a step; those of the step before where they are the same."""
        if self._constant is None or self._constant[0] is not size or self._constant[1] != ascend:
            self._constant = size, ascend, self._numbers(size if ascend else -size)
        return self._constant[2]

    def _project(self, given: Given) -> tuple[Tensor, Tensor]:
        ball = self.norm
        if ball == "l2":
            assert given.numbers is not None
            keep = self.epsilon / torch.maximum(self._norms(given), self.epsilon).clamp(min=TINY)
            given = given._replace(numbers=self._numbers(given.numbers[:, 1:2], keep))
        elif ball == "l1":
            compute = compute_dtype(self.dtype)
            moved = move(given, "none", None, compute)[0]
            keep = threshold((moved - self.clean.to(compute)).abs(), self.epsilon)
            numbers = self._numbers(self.epsilon, keep)
            given = Given(moved, None, self.clean, numbers, "none")
        return move(given, ball, self.bounds, self.dtype)

    def start(self, seed: Tensor, attempt: int = 0) -> tuple[Tensor, Tensor]:
        """A point of the ball, drawn uniformly, then moved into the bounds; results as those of `step`.

        Args:
            seed: 64 bits, int64, 0-d, on the device.
            attempt: Which of several points to draw.
        """
        compute = compute_dtype(self.dtype)
        seed = seed + attempt
        size = self.epsilon
        kind = {"linf": "uniform", "l2": "normal", "l1": "laplace"}[self.norm]
        given = Given(self.clean, None, None, None, kind, seed=seed)
        if self.norm != "linf":
            samples, elements = self.clean.shape
            drawn = uniform(seed, PhiloxPosition(0, 0, 1, 0), self.clean[:, :1].flatten()).to(compute)[
                :, None
            ]
            size = size * drawn ** (1 / elements) / self._norms(given).clamp(min=TINY)
        return move(given._replace(numbers=self._numbers(size)), "none", self.bounds, self.dtype)

    def _norms(self, given: Given) -> Tensor:
        return norms(given, 1 if self.norm == "l1" else 2)

    def _numbers(self, size: Tensor, keep: Tensor | None = None) -> Tensor:
        """`[samples or 1, 3]`: radius, size of the step, what a projection keeps."""
        columns = (self.epsilon, size, torch.ones_like(size) if keep is None else keep)
        return torch.cat(torch.broadcast_tensors(*columns), 1).contiguous()


def _both(bounds: Any) -> tuple[Limit, Limit]:
    """The lower and the upper one.

    Raises:
        TypeError: If they are not two.
    """
    try:
        low, high = bounds
    except (TypeError, ValueError):
        raise TypeError(f"bounds must be (lower, upper) or None, got {bounds!r}") from None
    return low, high


def _checked(x: Tensor, low: Limit, high: Limit, layout: Layout) -> Bounds:
    """The bounds, for samples as rows.

    Raises:
        ValueError: If they do not fit, or x is out of them.
    """
    lower, upper = (_fitting(x, limit) for limit in (low, high))
    if not _capturing(x.device) and x.numel():
        room = SLACK * (upper - lower)
        # One pass over all, or over what shares its bounds; NaN is let through.
        same = [d for d in range(x.dim()) if lower.shape[d] == upper.shape[d] == 1]
        least, most = x.amin(same, keepdim=True), x.amax(same, keepdim=True)
        outside = ((least < lower - room) | (most > upper + room)).any()
        crossed, outside = torch.stack(((lower > upper).any(), outside)).tolist()
        if crossed:
            raise ValueError(f"bounds must be (lower, upper) with lower <= upper, got {low!r} and {high!r}")
        if outside:
            raise ValueError(
                f"x must lie within the bounds, got values from {float(x.min()):.4g} to {float(x.max()):.4g} "
                f"for bounds {low!r} and {high!r}; of normalized inputs give the bounds of each channel, "
                "bounds=((0 - mean) / std, (1 - mean) / std), or bounds=None"
            )
    if lower.numel() == upper.numel() == 1:
        return Bounds(lower.reshape(()), upper.reshape(()), 1)
    lower, upper = (t.permute(layout.order)[0] for t in torch.broadcast_tensors(lower, upper))
    sizes, wanted = layout.shape[1:], list(lower.shape)
    varying = [dim for dim, size in enumerate(wanted) if size > 1]
    begin, end = varying[0], varying[-1] + 1
    shape = [*wanted[:begin], *sizes[begin:end], *wanted[end:]]
    spread = [t.expand(shape).reshape(-1).contiguous() for t in (lower, upper)]
    return Bounds(spread[0], spread[1], math.prod(sizes[end:]))


def _fitting(x: Tensor, limit: Limit) -> Tensor:
    """In the dtype of x, with as many dimensions and one sample."""
    limit = torch.as_tensor(limit).detach().to(x.device, x.dtype)
    if limit.dim() == 1 and len(limit) > 1 and x.dim() > 1:
        limit = limit.view(1, -1, *[1] * (x.dim() - 2))
    shape: Sequence[int] = [1] * (x.dim() - limit.dim()) + list(limit.shape)
    if (
        len(shape) > x.dim()
        or shape[0] != 1
        or any(size not in (1, whole) for size, whole in zip(shape[1:], x.shape[1:], strict=True))
    ):
        raise ValueError(
            f"bounds must be numbers, [channels] or broadcast with a sample, {tuple(x.shape[1:])}, got shape "
            f"{tuple(limit.shape)}"
        )
    return limit.view(list(shape))


def _capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded, within which nothing can be looked at."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A seed from a generator, by default torch's own for the device: int64, 0-d, on the device."""
    place: Any = device if generator is None else generator.device
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=place, generator=generator)
    return seed.to(device)
