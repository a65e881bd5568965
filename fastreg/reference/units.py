"""Sums over the units of a parameter: rows of a matrix, output channels of a convolution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .step import compute_dtype


class Place(NamedTuple):
    """Where the units of a parameter lie in memory; its flat elements are `[..., number, stride]`."""

    stride: int
    number: int


def unit_squares(parameter: Tensor, gradient: Tensor, place: Place) -> Tensor:
    """(Σ p², Σ g²) over every unit of a flat parameter: `[number, 2]`, in compute precision."""
    compute = compute_dtype(parameter.dtype)
    return torch.stack(
        [
            t.view(-1, place.number, place.stride).to(compute).square().sum((0, 2))
            if t.numel()
            else torch.zeros(place.number, dtype=compute, device=t.device)
            for t in (parameter, gradient)
        ],
        1,
    )


def spread(values: Tensor, place: Place, elements: int) -> Tensor:
    """The value of its unit for every flat element: `[elements]`."""
    outer = elements // max(place.stride * place.number, 1)
    return values.view(1, -1, 1).expand(outer, place.number, place.stride).reshape(-1).contiguous()
