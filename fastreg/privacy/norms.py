"""The norms of all per-sample gradients: many small operations are made few large ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import ghost as reference
from ..reference.step import scalar_dtype
from .parts import Dense, Outer, Part, Squares


class Noted(NamedTuple):
    """A part, with what was taken of it while it was fresh."""

    part: Part
    sums: Tensor | None = None  # of a ghost norm
    squares: Squares | None = None


def measured(noted: Sequence[Noted], home: torch.device) -> tuple[Tensor, Tensor]:
    """Squared norms and by how much they may be too small: `[parts, samples]` twice in double.

    Args:
        noted: Parts of the same samples.
        home: Where results are wanted.
    """
    wide = scalar_dtype(home)
    found: list[Squares | None] = [note.squares for note in noted]
    ghosts: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, note in enumerate(noted):
        if note.sums is not None:
            ghosts.setdefault((note.sums.device, note.part.dtype), []).append(i)
        elif note.squares is None:
            found[i] = note.part.squares()
    for (_, dtype), own in ghosts.items():
        parts = [noted[i].part for i in own]
        sums = torch.stack([noted[i].sums for i in own])  # type: ignore[misc]
        results = reference.ghost_squares(
            sums, [part.terms for part in parts], [part.shape for part in parts], dtype
        )
        for i, squares, error in zip(own, *(result.unbind() for result in results), strict=True):
            found[i] = squares, error
    squares, errors = zip(*(pair for pair in found if pair is not None), strict=True)
    return tuple(torch.stack([t.to(home, wide) for t in each]) for each in (squares, errors))  # type: ignore[return-value]


def small(part: Part) -> bool:
    """Whether it is worth while to handle it together with others."""
    return isinstance(part, Dense) and part.values[:1].numel() <= reference.SHORT


def ghostly(part: Part) -> bool:
    """Whether its norm is a ghost norm."""
    return isinstance(part, Outer) and part.ghostly
