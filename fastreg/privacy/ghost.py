"""Which code takes a ghost norm, and inner products that several layers share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import ghost as reference

CHUNK = 2**24
"""Inner products that are held at a time."""


class Grams:
    """The inner products of the latest input: queries, keys and values are made of the same one."""

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._gram: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """`reference.gram(x)`, from before if x is the same memory, unchanged."""
        if self._x is None or self._gram is None or _place(self._x) != _place(x):
            self._x, self._gram = x, reference.gram(x)
        return self._gram

    def forget(self) -> None:
        """Let go of both."""
        self._x = self._gram = None


def _place(x: Tensor) -> tuple[object, ...]:
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, x._version


def ghost_sums(left: Tensor, right: Tensor, grams: Grams | None = None) -> Tensor:
    """`reference.ghost_sums`, some samples at a time where there are many positions."""
    samples, positions, _ = left.shape
    step = max(1, CHUNK // max(1, positions**2))
    if step >= samples:
        return reference.ghost_sums(left, right, None if grams is None else grams.of(right))
    pieces = zip(left.split(step), right.split(step), strict=True)
    return torch.cat([reference.ghost_sums(*piece) for piece in pieces], 1)
