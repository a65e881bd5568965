"""The global gradient norm and the clip factor that follows from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .step import CHUNK, scalar_dtype


def square_sum(gradients: Sequence[Tensor]) -> Tensor:
    """Partial sums of g² over flat tensors of one device: `[chunks]`, float64, empty ones left out."""
    norms = [
        torch.linalg.vector_norm(chunk, dtype=torch.promote_types(chunk.dtype, torch.float32))
        for g in gradients
        for chunk in g.split(CHUNK)
        if chunk.numel()
    ]
    if not norms:
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack(norms).to(scalar_dtype(norms[0].device)).square()


def clip_factor(partial: Tensor, max_norm: Tensor) -> Tensor:
    """(Σ partial, its root, min(max_norm / (root + 1e-6), 1)): `[3]`, float64  (Pascanu et al. 2013)."""
    square = partial.sum()
    norm = square.sqrt()
    return torch.stack((square, norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)))
