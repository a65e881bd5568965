"""Computes norms of per-sample gradients without forming them, and bounds on their rounding errors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .step import compute_dtype, scalar_dtype

CONFIDENCE = 4.0
"""λ of the error bound λ√n·u on a sum of n products (Higham & Mary 2019).  With random rounding one sum in
1500 exceeds it, a sum over many of them never; equal addends, whose errors all agree, reach 2.7."""


def rounding(terms: int, dtype: torch.dtype) -> float:
    """Returns the error bound of a sum of n products, as a share of Σ|a||b|: min(n, λ√n)·u.

    Tensor cores, which multiply 16-bit factors, truncate sums, once in 8 terms: up to 2u each.
    """
    cut = terms / 4 if dtype.itemsize < 4 else 0
    return (min(terms, CONFIDENCE * terms**0.5) + cut) * torch.finfo(compute_dtype(dtype)).eps / 2


def gram(x: Tensor) -> Tensor:
    """Returns the inner products of all positions of a sample, `[samples, positions, positions]`."""
    x = x.to(compute_dtype(x.dtype))
    return torch.bmm(x, x.mT)


def ghost_sums(left: Tensor, right: Tensor, right_gram: Tensor | None = None) -> Tensor:
    """Returns the sums that give the norm of Σ_t left_t ⊗ right_t and its error, for every sample.

    With the inner products L_ts = ⟨left_t, left_s⟩ and R_ts: Σ L_ts R_ts, which is the squared norm
    (Goodfellow 2015), Σ L², Σ R², Σ_t L_tt and Σ_t R_tt; `[5, samples]` in compute precision.

    Args:
        left: `[samples, positions, p]`.
        right: `[samples, positions, d]`.
        right_gram: `gram(right)`, if it is known.
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
    """Returns the squared norm of every sample, and a bound on how much rounding has made it too small.

    An inner product L_ts is off by up to `rounding`·|a||b|, which is multiplied with R_ts.  By Cauchy-Schwarz
    errors of L contribute ‖R‖·Σ_t L_tt at most, and errors of R contribute ‖L‖·Σ_t R_tt.  The bound includes
    products that underflow.

    Args:
        sums: Results of `ghost_sums` for some matrices, `[matrices, 5, samples]`.
        positions: Number of outer products summed in each matrix.
        shapes: Rows and columns of each matrix.
        dtype: Of the factors.

    Returns:
        Two tensors `[matrices, samples]`, float64.
    """
    wide, tiny = scalar_dtype(sums.device), torch.finfo(sums.dtype).tiny
    p, d = zip(*shapes, strict=True)
    left = [rounding(n, dtype) + rounding(t, dtype) for n, t in zip(p, positions, strict=True)]
    constants = left, [rounding(n, dtype) for n in d], positions, p, d
    left_error, right_error, t, p_, d_ = torch.tensor(constants, dtype=wide).to(sums.device)[..., None]
    squares, outer, inner, outer_trace, inner_trace = sums.to(wide).unbind(1)
    outer, inner = ((x + t.square() * tiny).sqrt() for x in (outer, inner))
    error = left_error * inner * outer_trace + right_error * outer * inner_trace
    return squares, error + tiny * (t * (p_ * outer_trace + d_ * inner_trace) + p_ * d_)


def sample_sums(
    grad: Tensor, x: Tensor | None, mean: Tensor | None, deviation: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Returns Σ_t grad_t · (x_t - mean_t) · deviation_t and Σ_t grad_t of every sample.

    Both are `[samples, features]` in compute precision; the first is `None` without x.

    Args:
        grad: `[samples, positions, features]`.
        x: Of the same shape; `None` if only the second sum is wanted.
        mean: `[samples, positions]`; `None`, with `deviation`, if x is normalized already.
        deviation: `[samples, positions]`, the factor of x - mean.
    """
    compute = compute_dtype(grad.dtype)
    if x is None:
        return None, grad.sum(1, dtype=compute)
    x, grad = x.to(compute), grad.to(compute)
    if mean is not None and deviation is not None:
        x = (x - mean.unsqueeze(-1)) * deviation.unsqueeze(-1)
    return (grad * x).sum(1), grad.sum(1)


def squares(x: Tensor) -> Tensor:
    """Returns Σ x² of every sample, `[samples, ...]` to `[samples]`, float64; float32 sums are kept short."""
    wide, x = scalar_dtype(x.device), x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    whole = x.shape[1] - x.shape[1] % BLOCK
    parts = [
        torch.linalg.vector_norm(part.to(compute_dtype(x.dtype)), dim=2).to(wide).square().sum(1)
        for part in (x[:, :whole].unflatten(1, (-1, BLOCK)), x[:, whole:].unsqueeze(1))
        if part.numel()
    ]
    return torch.stack(parts).sum(0) if parts else torch.zeros(len(x), dtype=wide, device=x.device)


BLOCK = 64
"""Elements whose squares are summed in float32: a norm is off by 1.2e-7 at most, also if all are equal."""
SHORT = 2**14
"""Elements of gradients that are small enough to be stacked."""
