"""Represents per-sample gradients of one parameter in the form that is cheapest to clip.

| class              | gradient of a sample                   | how its norm is found                   |
|--------------------|----------------------------------------|-----------------------------------------|
| `OuterProductGrad` | Σ_t left_t ⊗ right_t: matrices         | ghost norm, or materialized             |
| `EmbeddingGrad`    | row ids_t += values_t                  | rows of equal ids are summed            |
| `DenseGrad`        | materialized: biases, norms            | directly                                |
| `ConvGrad`         | windows of the input as outer products | materialized, some samples at a time    |
| `TiedGrad`         | embedding and output layer tied        | both norms and their inner product      |
| `MixedGrad`        | any sum of these                       | materialized, some samples at a time    |

The last two are in `mixed_grads.py`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import ghost as ghost_ops
from ..reference import ghost as reference
from ..reference.step import compute_dtype, scalar_dtype

CHUNK = 2**24
"""Elements of per-sample gradients that are materialized at a time if they are not kept."""

Squares = tuple[Tensor, Tensor]
"""Squared norms and a bound on how much too small rounding made them, `[samples]` each in float64."""


class PerSampleGrad(abc.ABC):
    """Per-sample gradients of one parameter (abstract base class).

    Attributes:
        samples: Number of samples.
        shape: Shape of the parameter.
        dtype: Data type of the stored tensors.
        terms: Number of addends of each element of a gradient.
    """

    samples: Any
    shape: Any
    dtype: Any
    terms: Any

    @property
    @abc.abstractmethod
    def magnitudes(self) -> Tensor:
        """Σ|addends| of each sample, to which rounding errors are relative: `[samples]` in float64."""

    @abc.abstractmethod
    def per_sample(self, first: int, last: int) -> Tensor:
        """Materializes the gradients of some samples, `[last - first, *shape]` in compute precision."""

    @abc.abstractmethod
    def weighted_sum(self, weights: Tensor, finite: Tensor | None, out: Tensor | None) -> Tensor:
        """Returns the weighted sum over samples in compute precision.

        Args:
            weights: `[samples]` in compute precision, 0 for excluded samples.
            finite: `[samples]`, False for excluded samples; `None` if there are none.
            out: The sum is added to this tensor in place, if not `None`.
        """

    def squares(self) -> Squares:
        """Returns squared norms from gradients that are materialized some samples at a time."""
        magnitudes = self.magnitudes
        result = torch.zeros(self.samples, dtype=scalar_dtype(magnitudes.device), device=magnitudes.device)
        for first, last in sample_ranges(self.samples, math.prod(self.shape)):
            result[first:last] = reference.squares(self.per_sample(first, last))
        return result, self._squared_error(result, reference.rounding(self.terms, self.dtype) * magnitudes)

    def _squared_error(self, squares: Tensor, error: Tensor) -> Tensor:
        """Returns the error of squared norms from that of norms, including squares that underflow."""
        lost = math.prod(self.shape) * torch.finfo(compute_dtype(self.dtype)).tiny
        return 2 * squares.sqrt() * error + error.square() + lost


def sample_ranges(samples: int, elements: int) -> Iterator[tuple[int, int]]:
    """Yields ranges of samples with at most `CHUNK` elements together, but at least one sample."""
    step = max(1, CHUNK // max(1, elements))
    for first in range(0, samples, step):
        yield first, min(first + step, samples)


def zero_nonfinite(x: Tensor, finite: Tensor | None) -> Tensor:
    """Returns `[samples, ...]` in compute precision with zeros for excluded samples, because 0·∞ is NaN."""
    x = x.to(compute_dtype(x.dtype))
    return x if finite is None else torch.where(_broadcast(finite, x), x, 0.0)


def _broadcast(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (x.dim() - 1))


@dataclass
class DenseGrad(PerSampleGrad):
    """Materialized per-sample gradients, `[samples, *shape]`."""

    values: Tensor

    samples = property(lambda self: len(self.values))
    shape = property(lambda self: self.values.shape[1:])
    dtype = property(lambda self: self.values.dtype)
    terms = 0

    @property
    def magnitudes(self) -> Tensor:
        """Zeros, because nothing is rounded between norm and sum."""
        return torch.zeros(self.samples, dtype=scalar_dtype(self.values.device), device=self.values.device)

    def per_sample(self, first: int, last: int) -> Tensor:
        """Returns a view of the stored gradients."""
        return self.values[first:last].to(compute_dtype(self.dtype))

    def squares(self) -> Squares:
        """Returns the squared norms of the stored gradients."""
        result = reference.squares(self.values)
        return result, self._squared_error(result, torch.zeros_like(result))

    def weighted_sum(self, weights: Tensor, finite: Tensor | None, out: Tensor | None) -> Tensor:
        """Multiplies the vector of weights by a matrix."""
        rows = zero_nonfinite(self.values.reshape(self.samples, math.prod(self.shape)), finite)
        value = (weights @ rows).view(self.shape)
        return value if out is None else out.add_(value)


@dataclass
class StackedGrad(DenseGrad):
    """Small gradients of several parameters side by side, for few operations instead of many."""

    sizes: Sequence[int]

    @classmethod
    def of(cls, grads: Sequence[DenseGrad]) -> StackedGrad:
        """Concatenates gradients of the same dtype and device."""
        rows = [grad.values.flatten(1) for grad in grads]
        return cls(torch.cat(rows, 1), [row.shape[1] for row in rows])


@dataclass
class OuterProductGrad(PerSampleGrad):
    """Matrices Σ_t left_t ⊗ right_t from `[samples, positions, p]` and `[samples, positions, d]`."""

    left: Tensor
    right: Tensor

    samples = property(lambda self: len(self.left))
    shape = property(lambda self: torch.Size((self.left.shape[-1], self.right.shape[-1])))
    dtype = property(lambda self: self.left.dtype)
    terms = property(lambda self: self.left.shape[1])

    @property
    def uses_ghost_norm(self) -> bool:
        """Whether inner products of positions cost less than the gradient itself (Bu et al. 2023)."""
        return 2 * self.left.shape[1] ** 2 <= math.prod(self.shape)

    def materialized(self) -> PerSampleGrad:
        """Returns a `DenseGrad` if that is cheaper; it then takes no more memory than both factors."""
        return self if self.uses_ghost_norm else DenseGrad(self.per_sample(0, self.samples))

    @property
    def magnitudes(self) -> Tensor:
        """Σ_t |left_t||right_t| of each sample."""
        wide = scalar_dtype(self.left.device)
        norms = (
            torch.linalg.vector_norm(x.to(compute_dtype(x.dtype)), dim=-1) for x in (self.left, self.right)
        )
        return math.prod(x.to(wide) for x in norms).sum(1)

    def per_sample(self, first: int, last: int) -> Tensor:
        """Computes one matrix product for each sample."""
        left, right = (x[first:last].to(compute_dtype(x.dtype)) for x in (self.left, self.right))
        return torch.bmm(left.mT, right)

    def squares(self) -> Squares:
        """Returns squared norms by the cheaper of both ways."""
        if not self.uses_ghost_norm:
            return super().squares()
        sums = ghost_ops.ghost_sums(self.left, self.right).unsqueeze(0)
        squares, error = reference.ghost_squares(sums, [self.terms], [self.shape], self.dtype)
        return squares[0], error[0]

    def weighted_sum(self, weights: Tensor, finite: Tensor | None, out: Tensor | None) -> Tensor:
        """Computes the product of the ordinary gradient after weighting the smaller factor."""
        left, right = zero_nonfinite(self.left, finite), zero_nonfinite(self.right, finite)
        weights = weights.view(-1, 1, 1)
        if left.shape[-1] <= right.shape[-1]:
            left = left * weights
        else:
            right = right * weights
        left, right = left.reshape(-1, left.shape[-1]).t(), right.reshape(-1, right.shape[-1])
        return left @ right if out is None else out.addmm_(left, right)


@dataclass
class EmbeddingGrad(PerSampleGrad):
    """Matrices of `count` rows whose row `ids[t]` gets `values[t]`.

    `ids` is `[samples, positions]`, `values` is `[samples, positions, features]`.
    """

    ids: Tensor
    values: Tensor
    count: int

    samples = property(lambda self: len(self.values))
    shape = property(lambda self: torch.Size((self.count, self.values.shape[-1])))
    dtype = property(lambda self: self.values.dtype)
    terms = property(lambda self: self.values.shape[1])

    @property
    def magnitudes(self) -> Tensor:
        """Σ_t |values_t| of each sample."""
        values = self.values.to(compute_dtype(self.dtype))
        return torch.linalg.vector_norm(values, dim=-1).to(scalar_dtype(values.device)).sum(1)

    def per_sample(self, first: int, last: int) -> Tensor:
        """Materializes matrices that are mostly zeros."""
        return self._scatter(self.ids, self.count, first, last).view(last - first, *self.shape)

    def squares(self) -> Squares:
        """Returns squared norms after rows of equal ids are summed, as many rows as positions."""
        (samples, positions), features = self.ids.shape, self.shape[1]
        if not self.values.numel():
            return super().squares()
        order = self.ids.sort(dim=1)
        rank = torch.zeros_like(self.ids)  # of each id among the distinct ids of its sample
        rank[:, 1:] = (order.values[:, 1:] != order.values[:, :-1]).cumsum(1)
        repeated = (positions - 1 - rank[:, -1]).to(scalar_dtype(rank.device))
        rank = torch.empty_like(rank).scatter_(1, order.indices, rank)
        result = torch.zeros_like(repeated)
        for first, last in sample_ranges(samples, positions * features):
            rows = self._scatter(rank, positions, first, last)
            result[first:last] = reference.squares(rows.view(last - first, -1))
        additions = torch.minimum(repeated, reference.CONFIDENCE * repeated.sqrt())
        share = additions * reference.rounding(1, self.dtype)
        return result, self._squared_error(result, share * self.magnitudes)

    def _scatter(self, ids: Tensor, count: int, first: int, last: int) -> Tensor:
        """Returns `[(last - first) * count, features]` with the values of some samples added by row."""
        features = self.shape[1]
        out = self.values.new_zeros((last - first) * count, features, dtype=compute_dtype(self.dtype))
        offsets = count * torch.arange(last - first, device=ids.device).unsqueeze(1)
        rows = (ids[first:last] + offsets).view(-1)
        return out.index_add_(0, rows, self.values[first:last].reshape(-1, features).to(out.dtype))

    def weighted_sum(self, weights: Tensor, finite: Tensor | None, out: Tensor | None) -> Tensor:
        """Adds weighted values to the rows of their ids."""
        values = zero_nonfinite(self.values, finite) * weights.view(-1, 1, 1)
        out = values.new_zeros(self.shape) if out is None else out
        return out.index_add_(0, self.ids.reshape(-1), values.reshape(-1, self.shape[1]))


@dataclass
class ConvGrad(PerSampleGrad):
    """Gradients of a convolution's weight from its input and the gradient of its output."""

    module: Any
    x: Tensor
    grad: Tensor

    samples = property(lambda self: len(self.x))
    shape = property(lambda self: self.module.weight.shape)
    dtype = property(lambda self: self.x.dtype)
    terms = property(lambda self: math.prod(self.grad.shape[2:]))

    def materialized(self) -> PerSampleGrad:
        """Returns a `DenseGrad` if that takes no more memory than input and output."""
        fits = math.prod(self.shape) * self.samples <= self.x.numel() + self.grad.numel()
        return DenseGrad(self.per_sample(0, self.samples)) if fits else self

    @property
    def magnitudes(self) -> Tensor:
        """Upper bound |x|·|grad| times the root of how many windows contain an element."""
        wide = scalar_dtype(self.x.device)
        windows = math.prod(self.module.kernel_size)
        return (reference.squares(self.x) * reference.squares(self.grad) * windows).sqrt().to(wide)

    def per_sample(self, first: int, last: int) -> Tensor:
        """Unfolds the input and computes a matrix product for each group of each sample."""
        groups = self.module.groups
        x = self._padded(self.x[first:last].to(compute_dtype(self.dtype)))
        dimensions = x.dim() - 2
        geometry = zip(self.module.kernel_size, self.module.stride, self.module.dilation, strict=True)
        for i, (size, stride, dilation) in enumerate(geometry):
            x = x.unfold(2 + i, (size - 1) * dilation + 1, stride)[..., ::dilation]
        x = x.unflatten(1, (groups, -1))  # [samples, groups, channels, *positions, *kernel]
        spatial = [3 + i for i in range(dimensions)]
        kernel = [3 + dimensions + i for i in range(dimensions)]
        positions = math.prod(x.shape[3 : 3 + dimensions])
        window = math.prod(self.shape[1:])
        x = x.permute(0, 1, *spatial, 2, *kernel).reshape(last - first, groups, positions, window)
        grad = self.grad[first:last].to(x.dtype)
        grad = grad.reshape(last - first, groups, self.shape[0] // groups, positions)
        return (grad @ x).view(last - first, *self.shape)

    def _padded(self, x: Tensor) -> Tensor:
        mode = self.module.padding_mode
        pads = self.module._reversed_padding_repeated_twice
        return F.pad(x, pads, mode="constant" if mode == "zeros" else mode) if any(pads) else x

    def weighted_sum(self, weights: Tensor, finite: Tensor | None, out: Tensor | None) -> Tensor:
        """Computes the ordinary gradient of the weight from a weighted gradient of the output."""
        x, grad = zero_nonfinite(self.x, finite), zero_nonfinite(self.grad, finite)
        padding = self.module.padding
        if self.module.padding_mode != "zeros" or isinstance(padding, str):
            x, padding = self._padded(x), (0,) * (x.dim() - 2)
        if not x.numel() or not grad.numel():
            return x.new_zeros(self.shape) if out is None else out
        _, value, _ = torch.ops.aten.convolution_backward(
            grad * _broadcast(weights, grad), x, x.new_empty(self.shape), None, self.module.stride, padding,
            self.module.dilation, False, [0] * (x.dim() - 2), self.module.groups, (False, True, False),
        )  # fmt: skip
        return value if out is None else out.add_(value)
