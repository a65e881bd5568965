"""Moves inputs within a ball around the clean ones: steps, projections and random starts."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.validation import check_choice, check_flag, check_range
from ..ops.adversarial import Bounds, StepInputs, move, norms
from ..reference.adversarial import threshold
from ..reference.random import PhiloxPosition, uniform
from ..reference.step import compute_dtype
from ..runtime.device import capturing

NORMS = ("linf", "l2", "l1")
TINY = 1e-12
"""The least norm that a gradient is divided by."""
SLACK = 0.01
"""How far inputs may be out of bounds, as a share of their width: the error of rounding to bfloat16."""

Limit = float | Tensor
Range = tuple[Limit, Limit] | None


class Layout:
    """Reshapes tensors like x, `[samples, ...]`, to one row per sample, in memory order, and back."""

    def __init__(self, x: Tensor) -> None:
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        dense = order[0] == 0 and x.permute(order).is_contiguous()
        self.order = order if dense else list(range(x.dim()))
        self.shape = [x.shape[dim] for dim in self.order]
        self.back = sorted(range(x.dim()), key=self.order.__getitem__)

    def flatten(self, tensor: Tensor) -> Tensor:
        """Returns a tensor as `[samples, elements]`, contiguous."""
        return tensor.permute(self.order).contiguous().view(self.shape[0], math.prod(self.shape[1:]))

    def unflatten(self, rows: Tensor) -> Tensor:
        """Returns rows in the shape of x, with its strides."""
        return rows.view(self.shape).permute(self.back)


class Ball:
    """All inputs within a distance of clean ones, and within bounds.

    Arguments are those of `fgsm`.

    Raises:
        TypeError: If x is not of a floating dtype, or bounds are not two.
        ValueError: For values out of range and shapes that do not fit.
    """

    def __init__(self, x: Tensor, epsilon: Limit, norm: str, bounds: Range, steepest: bool = False) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(
                f"x must be a tensor of a floating dtype, got {getattr(x, 'dtype', type(x))}; scale images "
                "to [0, 1], and for token ids perturb the embeddings: fastreg.FGM(model)"
            )
        if not x.dim():
            raise ValueError("x must be [samples, ...], got a 0-d tensor; use x[None]")
        check_choice("norm", norm, NORMS)
        self.norm, self.dtype = norm, x.dtype
        self.steepest = check_flag("steepest", steepest) and norm == "l1"
        self.layout = Layout(x)
        self.clean = self.layout.flatten(x.detach())
        self.epsilon = self.per_sample("epsilon", epsilon)
        self._signed: tuple[Tensor, bool, Tensor] | None = None
        self.bounds = None if bounds is None else _checked(x, bounds, self.layout)

    def per_sample(self, name: str, value: Limit) -> Tensor:
        """Returns a number for each sample, or one for all, as `[samples or 1, 1]`.

        Raises:
            ValueError: If a number is not finite or below 0, or there are not as many as samples.
        """
        compute, device = compute_dtype(self.dtype), self.clean.device
        if isinstance(value, Tensor):
            if value.numel() not in (1, len(self.clean)):
                raise ValueError(
                    f"{name} must be a number or [{len(self.clean)}], one for each sample, got shape "
                    f"{tuple(value.shape)}"
                )
            value = value.detach().to(device, compute).reshape(-1, 1)
            if not capturing(device) and not bool(((value >= 0) & (value < math.inf)).all()):
                raise ValueError(f"{name} must be finite and >= 0, got {name}={value.flatten().tolist()}")
            return value
        return torch.full((1, 1), check_range(name, value, 0), dtype=compute, device=device)

    def step(
        self, point: Tensor | None, gradient: Tensor, size: Tensor, ascend: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Returns points after a step along the gradient, in the dtype of the clean inputs and not rounded.

        Present points are `[samples, elements]`, and the new ones are projected on the ball; without points
        the step is from the clean inputs, and must not be longer than epsilon.  The gradient is
        `[samples, ...]`, the length of the step `[samples or 1, 1]`; the loss is to rise if `ascend`.
        """
        gradient = self.layout.flatten(gradient)
        kind, peaks = ("sign" if self.norm == "linf" else "peak" if self.steepest else "scaled"), None
        if kind == "peak":
            peaks = torch.where(gradient.isfinite(), gradient.abs(), 0).argmax(1)
        elif kind == "scaled":
            size = size / self._norms(StepInputs(self.clean, gradient, None, None, kind)).clamp(min=TINY)
        if self._signed is None or self._signed[0] is not size or self._signed[1] != ascend:
            self._signed = size, ascend, self._step_scalars(size if ascend else -size)
        inputs = StepInputs(self.clean, gradient, None, self._signed[2], kind, peaks)
        if point is None:
            return move(inputs, "none", self.bounds, self.dtype)
        return self._project(inputs._replace(x=point, clean=self.clean))

    def _project(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        if self.norm == "l2":
            assert inputs.step_scalars is not None
            keep = self.epsilon / torch.maximum(self._norms(inputs), self.epsilon).clamp(min=TINY)
            inputs = inputs._replace(step_scalars=self._step_scalars(inputs.step_scalars[:, 1:2], keep))
        elif self.norm == "l1":
            compute = compute_dtype(self.dtype)
            moved = move(inputs, "none", None, compute)[0]
            keep = threshold((moved - self.clean.to(compute)).abs(), self.epsilon)
            inputs = StepInputs(moved, None, self.clean, self._step_scalars(self.epsilon, keep), "none")
        return move(inputs, self.norm, self.bounds, self.dtype)

    def start(self, seed: Tensor, attempt: int = 0) -> tuple[Tensor, Tensor]:
        """Returns a point drawn uniformly from the ball and clamped to the bounds, in the form of `step`.

        The seed is int64, 0-d, on the device; `attempt` tells several points for one seed apart.
        """
        seed, size = seed + attempt, self.epsilon
        kind = {"linf": "uniform", "l2": "normal", "l1": "laplace"}[self.norm]
        inputs = StepInputs(self.clean, None, None, None, kind, seed=seed)
        if self.norm != "linf":
            first = self.clean[:, :1].flatten()
            draws = uniform(seed, PhiloxPosition(0, 0, 1, 0), first).to(size.dtype).unsqueeze(1)
            size = size * draws ** (1 / self.clean.shape[1]) / self._norms(inputs).clamp(min=TINY)
        return move(inputs._replace(step_scalars=self._step_scalars(size)), "none", self.bounds, self.dtype)

    def _norms(self, inputs: StepInputs) -> Tensor:
        return norms(inputs, 1 if self.norm == "l1" else 2)

    def _step_scalars(self, size: Tensor, keep: Tensor | None = None) -> Tensor:
        """Radius, step size and `keep` of the projection, `[samples or 1, 3]`."""
        columns = (self.epsilon, size, torch.ones_like(size) if keep is None else keep)
        return torch.cat(torch.broadcast_tensors(*columns), 1).contiguous()


def _checked(x: Tensor, bounds: Any, layout: Layout) -> Bounds:
    """Returns the bounds for samples as rows.

    Raises:
        TypeError: If there are not two bounds.
        ValueError: If their shapes do not fit, or x is out of bounds.
    """
    try:
        low, high = bounds
    except (TypeError, ValueError):
        raise TypeError(f"bounds must be (lower, upper) or None, got {bounds!r}") from None
    lower, upper = (_fitting(x, limit) for limit in (low, high))
    if not capturing(x.device) and x.numel():
        room = SLACK * (upper - lower)
        # One pass over all elements that share their bounds; NaN is allowed.
        same = [d for d in range(x.dim()) if lower.shape[d] == upper.shape[d] == 1]
        least, most = x.amin(same, keepdim=True), x.amax(same, keepdim=True)
        outside = ((least < lower - room) | (most > upper + room)).any()
        crossed, outside = torch.stack(((lower > upper).any(), outside)).tolist()
        if crossed:
            raise ValueError(f"bounds must be (lower, upper) with lower <= upper, got {low!r} and {high!r}")
        if outside:
            raise ValueError(
                f"x must lie within the bounds, got values from {float(x.min()):.4g} to {float(x.max()):.4g} "
                f"for bounds {low!r} and {high!r}; for normalized inputs give the bounds of each channel, "
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
    """Returns a bound in the dtype of x, with as many dimensions and one sample."""
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
