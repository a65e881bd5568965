"""Sums over the units of a parameter: rows of a matrix, output channels of a convolution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .step import compute_dtype


@dataclass(frozen=True)
class UnitLayout:
    """Where the units of a parameter lie in memory; its flat elements are `[..., count, stride]`."""

    stride: int
    count: int


def unit_squares(parameter: Tensor, gradient: Tensor, place: UnitLayout) -> Tensor:
    """(Σ p², Σ g²) over every unit of a flat parameter: `[count, 2]`, in compute precision."""
    compute = compute_dtype(parameter.dtype)
    return torch.stack(
        [
            t.view(-1, place.count, place.stride).to(compute).square().sum((0, 2))
            if t.numel()
            else torch.zeros(place.count, dtype=compute, device=t.device)
            for t in (parameter, gradient)
        ],
        1,
    )


def spread(values: Tensor, place: UnitLayout, elements: int) -> Tensor:
    """The value of its unit for every flat element: `[elements]`."""
    outer = elements // max(place.stride * place.count, 1)
    return values.view(1, -1, 1).expand(outer, place.count, place.stride).reshape(-1).contiguous()
