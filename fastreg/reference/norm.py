"""Computes the global gradient norm, and the clipping factor that follows from it."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .step import compute_dtype, scalar_dtype

ROW = 2**9
"""Elements whose squares are summed in their own precision.  Float32 sums lose digits with length: over
38 M elements of one tensor torch's own norm is 3e-3 off on a CPU, this one 2e-10; of bfloat16 it is 2e-8,
with rows of 2¹² elements 5e-7."""
SHORT = 2**10
"""Elements up to which a tensor is one row: two calls would take longer."""
CHUNK = 2**20
"""Elements that are taken at a time: converting more would wait for memory."""


class Measured(NamedTuple):
    """The norm of all gradients together and its consequences, float64 each, 0-d."""

    bad: Tensor  # 1 where something is not finite, else 0
    total: Tensor  # Σ g² or max |g| of the gradients as they are
    norm: Tensor  # unscaled
    clipped: Tensor  # the norm after clipping
    factor: Tensor  # unscales and clips: min(max_norm / (norm + 1e-6), 1) / scale


def partial_norms(gradients: Iterable[Tensor], kind: str, device: torch.device) -> Tensor:
    """Returns partial sums of g² or |g|, or the largest |g| of each flat tensor, in double.

    The kind is `"largest"`, `"absolute"`, or any other for squares, see `engine.batch.NormSpec`.
    """
    norms = [
        _of_rows(rows.to(compute_dtype(rows.dtype)), kind).view(-1)
        for g in gradients
        if g.numel()
        for rows in (_rows(g) if g.numel() > SHORT else (g,))
    ]
    scalar = scalar_dtype(device)
    if not norms:
        return torch.zeros(1, dtype=scalar, device=device)
    partial = torch.cat(norms).to(scalar)
    return partial if kind in ("largest", "absolute") else partial.square()


def _of_rows(rows: Tensor, kind: str) -> Tensor:
    if kind == "absolute":  # torch's norm of order 1 takes six times as long
        return rows.abs().sum(-1)
    return torch.linalg.vector_norm(rows, math.inf if kind == "largest" else 2, dim=-1)


def _rows(gradient: Tensor) -> Iterator[Tensor]:
    """Yields the elements as `[rows, ROW]`, a chunk at a time, and the remainder of each as `[n]`."""
    for chunk in gradient.split(CHUNK):
        whole = chunk.numel() // ROW * ROW
        if whole:
            yield chunk[:whole].view(-1, ROW)
        if whole < chunk.numel():
            yield chunk[whole:]


def clip_factor(partial: Tensor, limits: Tensor, largest: bool) -> Tensor:
    """Returns `Measured` as `[5]`, from partial results and (max_norm, 1 / scale)  (Pascanu et al. 2013)."""
    max_norm, inverse_scale = limits.unbind()
    total = partial.amax() if largest else partial.sum()
    norm = (total if largest else total.sqrt()) * inverse_scale
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    bad = (~total.isfinite()).to(total.dtype)
    return torch.stack((bad, total, norm, norm * factor, factor * inverse_scale))
