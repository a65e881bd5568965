"""Which code takes a ghost norm, and inner products that several layers share."""

from __future__ import annotations

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
        if self._x is None or _place(self._x) != _place(x):
            self._x, self._gram = x, reference.gram(x)
        assert self._gram is not None
        return self._gram

    def forget(self) -> None:
        """Let go of both."""
        self._x = self._gram = None


def _place(x: Tensor) -> tuple[object, ...]:
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, x._version


def ghost_squares(left: Tensor, right: Tensor, grams: Grams | None = None) -> tuple[Tensor, Tensor]:
    """See `reference.ghost_squares`, some samples at a time where there are many positions."""
    samples, positions = left.shape[:2]
    step = max(1, CHUNK // max(1, positions**2))
    if step >= samples:
        known = grams.of(right) if grams is not None else None
        return reference.ghost_squares(left, right, right_gram=known)
    pieces = [
        reference.ghost_squares(left[i : i + step], right[i : i + step]) for i in range(0, samples, step)
    ]
    squares, error = zip(*pieces, strict=True)
    import torch
    return torch.cat(squares), torch.cat(error)
