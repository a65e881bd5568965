"""Norms of per-sample gradients of matrices that are never formed, and what rounding may have cost them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .step import compute_dtype, scalar_dtype

CONFIDENCE = 4.0
"""λ of the error bound λ√n·u on a sum of n products (Higham & Mary 2019).  With random rounding one sum in
1500 exceeds it, a sum over many of them never; equal addends, whose errors all agree, reach 2.7."""


def rounding(terms: int, dtype: torch.dtype) -> float:
    """By what share of Σ|a||b| a sum of so many products may be off: min(n, λ√n)·u.

    Tensor cores, which take factors of 16 bits, cut off where they add, once in 8 terms: up to 2u each.
    """
    cut = terms / 4 if dtype.itemsize < 4 else 0
    return (min(terms, CONFIDENCE * terms**0.5) + cut) * torch.finfo(compute_dtype(dtype)).eps / 2


def gram(x: Tensor) -> Tensor:
    """`[samples, positions, features]` to all inner products within a sample, `[samples, positions²]`."""
    x = x.to(compute_dtype(x.dtype))
    return torch.bmm(x, x.mT)


def ghost_sums(left: Tensor, right: Tensor, right_gram: Tensor | None = None) -> Tensor:
    """What the norm of Σ_t left_t ⊗ right_t follows from, of every sample.

    With the inner products L_ts = ⟨left_t, left_s⟩ and R_ts: Σ L_ts R_ts, which is the squared norm
    (Goodfellow 2015), Σ L², Σ R², Σ_t L_tt and Σ_t R_tt.

    Args:
        left: `[samples, positions, p]`.
        right: `[samples, positions, d]`.
        right_gram: `gram(right)` where it is known.

    Returns:
        `[5, samples]` in compute precision.
    """
    outer, inner = gram(left), gram(right) if right_gram is None else right_gram
    flat = outer.flatten(1), inner.flatten(1)
    return torch.stack(
        (
            torch.linalg.vecdot(*flat), *(torch.linalg.vecdot(x, x) for x in flat),
            *(x.diagonal(dim1=1, dim2=2).sum(1) for x in (outer, inner)),
        )
    )  # fmt: skip


def ghost_squares(
    sums: Tensor, positions: Sequence[int], shapes: Sequence[Sequence[int]], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The squared norm of every sample, and by how much rounding may have made it too small.

    An inner product is off by `rounding`·|a||b|, which weighs as much as the other is large; by
    Cauchy-Schwarz that is ‖R‖·Σ_t L_tt at most for errors of L, and likewise.  What underflows is lost, too.

    Args:
        sums: Those of `ghost_sums` for some matrices, `[matrices, 5, samples]`.
        positions: Addends of each matrix.
        shapes: Its rows and columns.
        dtype: Of the factors.

    Returns:
        `[matrices, samples]` twice in double.
    """
    wide, tiny = scalar_dtype(sums.device), torch.finfo(sums.dtype).tiny
    p, d = zip(*shapes, strict=True)
    loose = [rounding(n, dtype) + rounding(t, dtype) for n, t in zip(p, positions, strict=True)]
    numbers = loose, [rounding(n, dtype) for n in d], positions, p, d
    loosely, closely, t, p_, d_ = torch.tensor(numbers, dtype=wide).to(sums.device).unsqueeze(-1).unbind()
    squares, outer, inner, outer_trace, inner_trace = sums.to(wide).unbind(1)
    outer, inner = ((x + t.square() * tiny).sqrt() for x in (outer, inner))
    error = loosely * inner * outer_trace + closely * outer * inner_trace
    return squares, error + tiny * (t * (p_ * outer_trace + d_ * inner_trace) + p_ * d_)


def sample_sums(
    grad: Tensor, x: Tensor | None, mean: Tensor | None, deviation: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Σ_t grad_t · (x_t - mean_t) · deviation_t and Σ_t grad_t of every sample.

    Args:
        grad: `[samples, positions, features]`.
        x: Likewise; `None` if only the second is wanted.
        mean: `[samples, positions]`; `None` with `deviation` if x is what it should be.
        deviation: `[samples, positions]`, what is multiplied with.

    Returns:
        `[samples, features]` twice in compute precision; the first is `None` without x.
    """
    compute = compute_dtype(grad.dtype)
    if x is None:
        return None, grad.sum(1, dtype=compute)
    x, grad = x.to(compute), grad.to(compute)
    if mean is not None and deviation is not None:
        x = (x - mean.unsqueeze(-1)) * deviation.unsqueeze(-1)
    return (grad * x).sum(1), grad.sum(1)


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
