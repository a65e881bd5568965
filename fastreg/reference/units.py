"""Sums over the units of a parameter: rows of a matrix, output channels of a convolution."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .step import compute_dtype


@dataclass(frozen=True)
class UnitLayout:
    """Where the units of a parameter lie in memory; its flat elements are `[..., count, stride]`."""

    stride: int
    count: int


def unit_squares(parameter: Tensor, gradient: Tensor, units: UnitLayout) -> Tensor:
    """Returns (Σ p², Σ g²) over each unit of a flat parameter: `[count, 2]`, in compute precision."""
    compute = compute_dtype(parameter.dtype)
    return torch.stack(
        [
            t.view(-1, units.count, units.stride).to(compute).square().sum((0, 2))
            if t.numel()
            else torch.zeros(units.count, dtype=compute, device=t.device)
            for t in (parameter, gradient)
        ],
        1,
    )


def spread(values: Tensor, units: UnitLayout, elements: int) -> Tensor:
    """Returns the value of its unit for each flat element: `[elements]`."""
    outer = elements // max(units.stride * units.count, 1)
    return values.view(1, -1, 1).expand(outer, units.count, units.stride).reshape(-1).contiguous()
