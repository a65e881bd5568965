"""The global gradient norm and the clip factor that follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .step import compute_dtype, scalar_dtype

ROW = 2**12
"""Elements whose squares are summed in their own precision.  Float32 sums lose digits with length: over
38 M elements of one tensor torch's own norm is 3e-3 off on a CPU, this one 5e-9."""
SHORT = 2**16
"""Elements up to which a tensor is one row: two calls would take longer, and it is 3e-7 off at worst."""
CHUNK = 2**20
"""Elements that are taken at a time: converting more would wait for memory."""


def square_sum(gradients: Sequence[Tensor]) -> Tensor:
    """Partial sums of g² over flat tensors of one device: `[rows]`, in double."""
    compute = compute_dtype(gradients[0].dtype)
    norms = [
        torch.linalg.vector_norm(rows.to(compute), dim=-1).view(-1)
        for g in gradients
        for rows in (_rows(g) if g.numel() > SHORT else (g,))
    ]
    return torch.cat(norms).to(scalar_dtype(norms[0].device)).square()


def _rows(gradient: Tensor) -> Iterator[Tensor]:
    """The elements as `[rows, ROW]`, a chunk at a time, and what is left of each as `[rest]`."""
    for chunk in gradient.split(CHUNK):
        whole = chunk.numel() // ROW * ROW
        if whole:
            yield chunk[:whole].view(-1, ROW)
        if whole < chunk.numel():
            yield chunk[whole:]


def clip_factor(partial: Tensor, max_norm: Tensor) -> Tensor:
    """(Σ partial, its root, min(max_norm / (root + 1e-6), 1)): `[3]`, float64  (Pascanu et al. 2013)."""
    square = partial.sum()
    norm = square.sqrt()
    return torch.stack((square, norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)))
