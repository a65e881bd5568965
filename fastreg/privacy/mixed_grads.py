"""Combines the per-sample gradients of a parameter that is used several times."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference import ghost as reference
from ..reference.step import compute_dtype, scalar_dtype
from .per_sample_grads import DenseGrad, EmbeddingGrad, OuterProductGrad, PerSampleGrad, Squares


@dataclass
class MixedGrad(PerSampleGrad):
    """The sum of several per-sample gradients of one parameter."""

    grads: Sequence[PerSampleGrad]

    samples = property(lambda self: self.grads[0].samples)
    shape = property(lambda self: self.grads[0].shape)
    dtype = property(lambda self: self.grads[0].dtype)
    terms = property(lambda self: sum(grad.terms + 1 for grad in self.grads))

    @property
    def magnitudes(self) -> Tensor:
        """Sum of the magnitudes of all addends; a dense gradient counts by its norm."""
        norms = (grad.squares()[0].sqrt() for grad in self.grads if isinstance(grad, DenseGrad))
        return sum([grad.magnitudes for grad in self.grads]) + sum(norms)  # type: ignore[return-value]

    def per_sample(self, first: int, last: int) -> Tensor:
        """Adds up the materialized gradients of some samples."""
        return sum(grad.per_sample(first, last) for grad in self.grads)  # type: ignore[return-value]

    def weighted_sum(self, weights: Tensor, finite: Tensor | None, out: Tensor | None) -> Tensor:
        """Adds up the weighted sums of all gradients."""
        for grad in reversed(self.grads):  # embeddings come last and then add to the sum in place
            out = grad.weighted_sum(weights, finite, out)
        return out  # type: ignore[return-value]


@dataclass
class TiedGrad(MixedGrad):
    """Gradients of an embedding matrix that is also the output layer's; neither is materialized for norms."""

    def squares(self) -> Squares:
        """Computes squared norms of the sum from norms and inner products.

        ‖E + H‖² = ‖E‖² + ‖H‖² + 2⟨E, H⟩ with ⟨E, H⟩ = Σ_ts left_s[ids_t]·⟨values_t, right_s⟩.
        """
        rows, outer = self.grads
        assert isinstance(rows, EmbeddingGrad) and isinstance(outer, OuterProductGrad)
        compute, wide = compute_dtype(self.dtype), scalar_dtype(rows.values.device)
        (rows_squares, rows_error), (outer_squares, outer_error) = rows.squares(), outer.squares()
        values, right = rows.values.to(compute), outer.right.to(compute)
        ids = rows.ids.unsqueeze(1).expand(-1, outer.left.shape[1], -1)
        chosen = outer.left.gather(2, ids).to(compute)  # [samples, s, t]
        cross = (chosen * torch.bmm(right, values.mT)).sum((1, 2)).to(wide)
        norms = (torch.linalg.vector_norm(x, dim=-1).unsqueeze(-1) for x in (right, values))
        largest = (chosen.abs() * torch.bmm(next(norms), next(norms).mT)).sum((1, 2)).to(wide)
        share = reference.rounding(values.shape[-1], self.dtype) + reference.rounding(self.terms, self.dtype)
        error = rows_error + outer_error + 2 * share * largest
        return rows_squares + outer_squares + 2 * cross, error


def join_grads(grads: Sequence[PerSampleGrad]) -> PerSampleGrad:
    """Returns the sum of the per-sample gradients of all uses of one parameter."""
    if len(grads) == 1:
        return grads[0]
    dense = [grad.values for grad in grads if type(grad) is DenseGrad]
    rows = [grad for grad in grads if type(grad) is EmbeddingGrad]
    outer = [grad for grad in grads if type(grad) is OuterProductGrad]
    joined: list[PerSampleGrad] = []
    if dense:
        joined.append(DenseGrad(sum(dense[1:], dense[0])))
    if rows:
        ids, values = (torch.cat([getattr(grad, name) for grad in rows], 1) for name in ("ids", "values"))
        joined.append(EmbeddingGrad(ids, values, rows[0].count))
    if outer:
        left, right = (torch.cat([getattr(grad, name) for grad in outer], 1) for name in ("left", "right"))
        joined.append(OuterProductGrad(left, right))
    joined += (g for g in grads if type(g) not in (DenseGrad, EmbeddingGrad, OuterProductGrad))
    if len(joined) == 1:
        return joined[0]
    tied = list(map(type, joined)) == [EmbeddingGrad, OuterProductGrad]
    return TiedGrad(joined) if tied else MixedGrad(joined)
