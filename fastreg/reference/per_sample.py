"""Clips per-sample gradients: their norms, the clip factors, the sum of the clipped gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .step import compute_dtype, scalar_dtype

CHUNK = 2**20
"""Elements converted at a time: a larger copy would leave the cache."""


def squared_norms(rows: Tensor) -> Tensor:
    """Returns Σ g² of each row of `[samples, length]`: `[samples]`, float64."""
    total = rows.new_zeros(len(rows), dtype=scalar_dtype(rows.device))
    for part in rows.split(max(CHUNK // max(len(rows), 1), 1), 1):
        total += part.to(total.dtype).square().sum(1)
    return total


def clip_factors(squares: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns norms and factors min(C / (norm + 1e-6), 1) from Σ g²  (Abadi et al. 2016).

    The factor of a sample is 0 if its norm is not finite, or so large that the factor underflows float32.

    Args:
        squares: Σ g², `[segments, samples]`, float64.
        limits: The largest norms C, `[segments]`.
    """
    norms = squares.sqrt()
    factors = (limits[:, None] / (norms + 1e-6)).clamp(max=1.0)
    counts = (norms < torch.inf) & (factors >= torch.finfo(torch.float32).tiny)
    return norms, torch.where(counts, factors, 0.0)


def weighted_sum(rows: Tensor, factors: Tensor, out: Tensor, accumulate: bool) -> None:
    """Computes out ← Σ factor · g over the rows of `[samples, length]`, added to `out` if `accumulate`.

    Rows with a factor of 0 are skipped, since 0 · NaN is not 0.
    """
    compute = compute_dtype(rows.dtype)
    kept = factors > 0
    if not bool(kept.all()):
        rows, factors = rows[kept], factors[kept]
    width = max(CHUNK // max(len(rows), 1), 1)
    for part, target in zip(rows.split(width, 1), out.split(width), strict=True):
        total = factors.to(compute) @ part.to(compute)
        target.copy_(target.to(compute) + total if accumulate else total)


def clip_and_sum(
    rows: Sequence[Tensor], out: Sequence[Tensor], limits: Tensor, accumulate: bool
) -> tuple[Tensor, Tensor]:
    """Clips every sample over all tensors together, or over each alone, and sums the results into `out`.

    Args:
        rows: `[samples, length]` each, of any floating dtypes.
        out: `[length]` each.
        limits: The largest norm, `[1]`, or that of each tensor, `[tensors]`; float64.
        accumulate: Whether to add to `out`.

    Returns:
        Norms and factors, `[1 or tensors, samples]`.
    """
    home = limits.device
    squares = torch.stack([squared_norms(tensor).to(home) for tensor in rows])
    if len(limits) == 1:
        squares = squares.sum(0, keepdim=True)
    norms, factors = clip_factors(squares, limits)
    for i, (tensor, target) in enumerate(zip(rows, out, strict=True)):
        row = factors[i if len(factors) > 1 else 0]
        weighted_sum(tensor, row.to(tensor.device), target, accumulate)
    return norms, factors
