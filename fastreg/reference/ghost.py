"""Norms of per-sample gradients of matrices that are never formed, and what rounding may have cost them."""

from __future__ import annotations

import torch
from torch import Tensor

from .step import compute_dtype, scalar_dtype

CONFIDENCE = 8.0
"""λ of the error bound λ√n·u on a product of n terms: it fails once in 10¹³ products (Higham & Mary 2019)."""


def rounding(terms: int, dtype: torch.dtype) -> float:
    """By what share of Σ|a||b| a sum of so many products may be off: min(n, λ√n)·u."""
    return min(terms, CONFIDENCE * terms**0.5) * torch.finfo(compute_dtype(dtype)).eps / 2


def gram(x: Tensor) -> Tensor:
    """`[samples, positions, features]` to all inner products within a sample, `[samples, positions²]`."""
    x = x.to(compute_dtype(x.dtype))
    return torch.bmm(x, x.mT)


def ghost_squares(
    left: Tensor, right: Tensor, left_gram: Tensor | None = None, right_gram: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """‖Σ_t left_t ⊗ right_t‖² = Σ_ts ⟨left_t, left_s⟩⟨right_t, right_s⟩ of every sample (Goodfellow 2015).

    Args:
        left: `[samples, positions, p]`.
        right: `[samples, positions, d]`.
        left_gram: `gram(left)` where it is known.
        right_gram: `gram(right)` where it is known.

    Returns:
        `[samples]` twice in double: the squares, which rounding may make negative, and by how much they may
        be too small at most.
    """
    p, d, dtype = left.shape[-1], right.shape[-1], left.dtype
    outer = gram(left) if left_gram is None else left_gram
    inner = gram(right) if right_gram is None else right_gram
    squares = (outer * inner).sum((1, 2))
    # |⟨a, b⟩| is off by rounding(n)·|a||b| at most, which weighs as much as the other product is large.
    left_norms, right_norms = (g.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt() for g in (outer, inner))
    loose = rounding(p, dtype) + rounding(left.shape[1], dtype)
    error = loose * _form(inner.abs(), left_norms) + rounding(d, dtype) * _form(outer.abs(), right_norms)
    # What underflows is lost, too.
    tiny = torch.finfo(compute_dtype(dtype)).tiny
    wide = scalar_dtype(left.device)
    lost = p * left_norms.to(wide).sum(1).square() + d * right_norms.to(wide).sum(1).square()
    return squares.to(wide), error.to(wide) + tiny * (lost + p * d)


def _form(matrix: Tensor, vector: Tensor) -> Tensor:
    """The quadratic form of each sample."""
    return (torch.bmm(matrix, vector.unsqueeze(-1)).squeeze(-1) * vector).sum(1)


def squares(x: Tensor) -> Tensor:
    """Σ x² of every sample in double, `[samples, ...]` to `[samples]`; sums in float32 are kept short."""
    wide, x = scalar_dtype(x.device), x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    parts = [
        torch.linalg.vector_norm(part.to(compute_dtype(x.dtype)), dim=1).to(wide).square()
        for part in x.split(SHORT, dim=1)
        if part.shape[1]
    ]
    return torch.stack(parts).sum(0) if parts else torch.zeros(len(x), dtype=wide, device=x.device)


SHORT = 2**14
"""Elements whose squares are summed in their own precision: 1.2e-7 off at worst."""
