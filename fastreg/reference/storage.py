"""How a weight is read from memory and written back."""

from __future__ import annotations

from torch import Tensor

from .random import At


def read_plain(source: Tensor) -> Tensor:
    """The weight is what the parameter holds."""
    return source


def write_plain(weight: Tensor, at: At) -> tuple[Tensor]:
    """The parameter gets the weight, rounded to nearest."""
    return (weight,)
