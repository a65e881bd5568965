"""Clipping of gradients that are held per sample: their norms, the factors, the sum of what is clipped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .step import compute_dtype, scalar_dtype

CHUNK = 2**20
"""Elements that are taken at a time: converting more would wait for memory."""


def squared_norms(rows: Tensor) -> Tensor:
    """Σ g² of every row of `[samples, length]`: `[samples]`, in double."""
    total = rows.new_zeros(len(rows), dtype=scalar_dtype(rows.device))
    for part in rows.split(max(CHUNK // max(len(rows), 1), 1), 1):
        total += part.to(total.dtype).square().sum(1)
    return total


def clip_factors(squares: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Norms and factors min(C / (norm + 1e-6), 1) from Σ g², `[segments, samples]`  (Abadi et al. 2016).

    A sample whose norm is not finite, or so large that float32 has no factor for it, counts for nothing: its
    factor is 0.

    Args:
        squares: `[segments, samples]`, in double.
        limits: The largest norms C, `[segments]`.
    """
    norms = squares.sqrt()
    factors = (limits[:, None] / (norms + 1e-6)).clamp(max=1.0)
    counts = (norms < torch.inf) & (factors >= torch.finfo(torch.float32).tiny)
    return norms, torch.where(counts, factors, 0.0)


def weighted_sum(rows: Tensor, factors: Tensor, out: Tensor, accumulate: bool) -> None:
    """out ← Σ factor · g over the rows of `[samples, length]`, on top of what is there if `accumulate`.

    A row with a factor of 0 is left out, whatever it holds: 0 · NaN is not 0.
    """
    compute = compute_dtype(rows.dtype)
    kept = factors > 0
    if not bool(kept.all()):
        rows, factors = rows[kept], factors[kept]
    width = max(CHUNK // max(len(rows), 1), 1)
    for part, target in zip(rows.split(width, 1), out.split(width), strict=True):
        found = factors.to(compute) @ part.to(compute)
        target.copy_(target.to(compute) + found if accumulate else found)


def clip_and_sum(
    rows: Sequence[Tensor], out: Sequence[Tensor], limits: Tensor, accumulate: bool
) -> tuple[Tensor, Tensor]:
    """Clip every sample over all tensors together, or over each alone, and sum what is clipped into `out`.

    Args:
        rows: `[samples, length]` each, of any floating dtypes.
        out: `[length]` each.
        limits: The largest norm, `[1]`, or that of each tensor, `[tensors]`; in double.
        accumulate: Whether to add to what `out` holds.

    Returns:
        Norms and factors, `[1 or tensors, samples]`.
    """
    home = limits.device
    squares = torch.stack([squared_norms(tensor).to(home) for tensor in rows])
    if len(limits) == 1:
        squares = squares.sum(0, keepdim=True)
    norms, factors = clip_factors(squares, limits)
    for i, (tensor, target) in enumerate(zip(rows, out, strict=True)):
        own = factors[i if len(factors) > 1 else 0].to(tensor.device)
        weighted_sum(tensor, own, target, accumulate)
    return norms, factors
