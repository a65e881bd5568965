"""What a use of a parameter gives to its per-sample gradients, in the form that is cheapest to clip.

| part          | gradient of a sample                     | norm                                      |
|---------------|------------------------------------------|-------------------------------------------|
| `Outer`       | Σ_t left_t ⊗ right_t: matrices           | ghost norm, or formed (see `Outer`)       |
| `Rows`        | row ids_t += values_t: embeddings        | rows of equal ids summed                  |
| `Dense`       | held: biases, norms, what is small       | its own                                   |
| `Convolution` | windows of the input as `Outer`          | formed, some samples at a time            |
| `Tied`        | `Rows` and `Outer` of one matrix         | both, and their inner product             |
| `Mixed`       | any of them together                     | formed, some samples at a time            |
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
"""Elements of per-sample gradients that are formed at a time where they are not kept."""

Squares = tuple[Tensor, Tensor]
"""`[samples]` twice in double: squared norms, and by how much these may be too small."""


class Part(abc.ABC):
    """Per-sample gradients of one parameter."""

    @property
    @abc.abstractmethod
    def samples(self) -> int:
        """How many samples there are."""

    @property
    @abc.abstractmethod
    def shape(self) -> torch.Size:
        """Of the parameter."""

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """Of what is held."""

    @abc.abstractmethod
    def per_sample(self, first: int, last: int) -> Tensor:
        """Those of some samples, `[last - first, *shape]` in compute precision."""

    @abc.abstractmethod
    def total(self, weights: Tensor, finite: Tensor | None, out: Tensor | None) -> Tensor:
        """Their weighted sum in compute precision, added to `out` if it is given.

        Args:
            weights: `[samples]` in compute precision, 0 for samples that count for nothing.
            finite: `[samples]`, which of them count; `None` if all do.
            out: What is added to, in place.
        """

    @property
    @abc.abstractmethod
    def magnitudes(self) -> Tensor:
        """Σ|addends| of each sample, which rounding of its gradient is a share of: `[samples]`, double."""

    @property
    @abc.abstractmethod
    def terms(self) -> int:
        """How many addends each element of a gradient has."""

    def squares(self) -> Squares:
        """Squared norms, from gradients that are formed for it, some samples at a time."""
        found = torch.zeros(self.samples, dtype=scalar_dtype(self.magnitudes.device)).to(
            self.magnitudes.device
        )
        for first, last in spans(self.samples, math.prod(self.shape)):
            found[first:last] = reference.squares(self.per_sample(first, last))
        return found, self._loosened(found, reference.rounding(self.terms, self.dtype) * self.magnitudes)

    def _loosened(self, squares: Tensor, error: Tensor) -> Tensor:
        """What an error of norms is for squares of norms; squares that underflow are lost, too."""
        lost = math.prod(self.shape) * torch.finfo(compute_dtype(self.dtype)).tiny
        return 2 * squares.sqrt() * error + error.square() + lost


def spans(samples: int, elements: int) -> Iterator[tuple[int, int]]:
    """Ranges of samples with `CHUNK` elements together at most, one sample at least."""
    step = max(1, CHUNK // max(1, elements))
    for first in range(0, samples, step):
        yield first, min(first + step, samples)


def selected(x: Tensor, finite: Tensor | None) -> Tensor:
    """`[samples, ...]` in compute precision with zeros for samples that count for nothing: 0·∞ is not 0."""
    x = x.to(compute_dtype(x.dtype))
    return x if finite is None else torch.where(_along(finite, x), x, 0.0)


def _along(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (x.dim() - 1))


def _added(value: Tensor, out: Tensor | None) -> Tensor:
    return value if out is None else out.add_(value)


@dataclass
class Dense(Part):
    """Gradients that are held, `[samples, *shape]`."""

    values: Tensor

    samples = property(lambda self: len(self.values))
    shape = property(lambda self: self.values.shape[1:])
    dtype = property(lambda self: self.values.dtype)
    terms = 0

    @property
    def magnitudes(self) -> Tensor:
        """They are summed as they are: nothing is rounded between norm and sum."""
        return torch.zeros(self.samples, dtype=scalar_dtype(self.values.device), device=self.values.device)

    def per_sample(self, first: int, last: int) -> Tensor:
        """A view."""
        return self.values[first:last].to(compute_dtype(self.dtype))

    def squares(self) -> Squares:
        """Of what is held."""
        found = reference.squares(self.values)
        return found, self._loosened(found, torch.zeros_like(found))

    def total(self, weights: Tensor, finite: Tensor | None, out: Tensor | None) -> Tensor:
        """A product of a vector and a matrix."""
        rows = selected(self.values.reshape(self.samples, math.prod(self.shape)), finite)
        return _added((weights @ rows).view(self.shape), out)


@dataclass
class Stacked(Dense):
    """Small ones of several parameters, side by side: few operations instead of many."""

    sizes: Sequence[int]

    @classmethod
    def of(cls, parts: Sequence[Dense]) -> Stacked:
        """Those of the same dtype and device."""
        rows = [part.values.flatten(1) for part in parts]
        return cls(torch.cat(rows, 1), [row.shape[1] for row in rows])


@dataclass
class Outer(Part):
    """Matrices Σ_t left_t ⊗ right_t from `[samples, positions, p]` and `[samples, positions, d]`."""

    left: Tensor
    right: Tensor

    samples = property(lambda self: len(self.left))
    dtype = property(lambda self: self.left.dtype)
    terms = property(lambda self: self.left.shape[1])

    @property
    def shape(self) -> torch.Size:
        """`[p, d]`."""
        return torch.Size((self.left.shape[-1], self.right.shape[-1]))

    @property
    def ghostly(self) -> bool:
        """Whether inner products of positions cost less than forming the gradient  (Bu et al. 2023)."""
        return 2 * self.left.shape[1] ** 2 <= math.prod(self.shape)

    def formed(self) -> Part:
        """Held gradients where these are cheaper, which then take no more memory than both factors."""
        return self if self.ghostly else Dense(self.per_sample(0, self.samples))

    @property
    def magnitudes(self) -> Tensor:
        """Σ_t |left_t||right_t|."""
        wide = scalar_dtype(self.left.device)
        norms = (
            torch.linalg.vector_norm(x.to(compute_dtype(x.dtype)), dim=-1) for x in (self.left, self.right)
        )
        return math.prod(x.to(wide) for x in norms).sum(1)

    def per_sample(self, first: int, last: int) -> Tensor:
        """One product of matrices for each sample."""
        left, right = (x[first:last].to(compute_dtype(x.dtype)) for x in (self.left, self.right))
        return torch.bmm(left.mT, right)

    def squares(self) -> Squares:
        """By the cheaper way."""
        if not self.ghostly:
            return super().squares()
        sums = ghost_ops.ghost_sums(self.left, self.right).unsqueeze(0)
        found, error = reference.ghost_squares(sums, [self.terms], [self.shape], self.dtype)
        return found[0], error[0]

    def total(self, weights: Tensor, finite: Tensor | None, out: Tensor | None) -> Tensor:
        """The product that gives the ordinary gradient; the smaller factor is weighted."""
        left, right = selected(self.left, finite), selected(self.right, finite)
        weights = weights.view(-1, 1, 1)
        if left.shape[-1] <= right.shape[-1]:
            left = left * weights
        else:
            right = right * weights
        left, right = left.reshape(-1, left.shape[-1]).t(), right.reshape(-1, right.shape[-1])
        return left @ right if out is None else out.addmm_(left, right)


@dataclass
class Rows(Part):
    """Matrices of `count` rows, whose row ids_t gets values_t: `[samples, positions]` and one more."""

    ids: Tensor
    values: Tensor
    count: int

    samples = property(lambda self: len(self.values))
    dtype = property(lambda self: self.values.dtype)
    terms = property(lambda self: self.values.shape[1])

    @property
    def shape(self) -> torch.Size:
        """`[count, features]`."""
        return torch.Size((self.count, self.values.shape[-1]))

    @property
    def magnitudes(self) -> Tensor:
        """Σ_t |values_t|."""
        values = self.values.to(compute_dtype(self.dtype))
        return torch.linalg.vector_norm(values, dim=-1).to(scalar_dtype(values.device)).sum(1)

    def per_sample(self, first: int, last: int) -> Tensor:
        """Mostly zeros."""
        formed = self.values.new_zeros(
            (last - first) * self.count, self.shape[1], dtype=compute_dtype(self.dtype)
        )
        return self._scatter(formed, self.ids, self.count, first, last).view(last - first, *self.shape)

    def squares(self) -> Squares:
        """Of the rows of each sample, as many as it has positions; rows of equal ids are summed first."""
        (samples, positions), features = self.ids.shape, self.shape[1]
        if not self.values.numel():
            return super().squares()
        order = self.ids.sort(dim=1)
        place = torch.zeros_like(self.ids)
        place[:, 1:] = (order.values[:, 1:] != order.values[:, :-1]).cumsum(1)
        repeated = (positions - 1 - place[:, -1]).to(scalar_dtype(place.device))
        place = torch.empty_like(place).scatter_(1, order.indices, place)
        found = torch.zeros_like(repeated)
        for first, last in spans(samples, positions * features):
            rows = self.values.new_zeros(
                (last - first) * positions, features, dtype=compute_dtype(self.dtype)
            )
            rows = self._scatter(rows, place, positions, first, last)
            found[first:last] = reference.squares(rows.view(last - first, -1))
        additions = torch.minimum(repeated, reference.CONFIDENCE * repeated.sqrt())
        share = additions * reference.rounding(1, self.dtype)
        return found, self._loosened(found, share * self.magnitudes)

    def _scatter(self, out: Tensor, ids: Tensor, count: int, first: int, last: int) -> Tensor:
        offsets = count * torch.arange(last - first, device=ids.device).unsqueeze(1)
        places = (ids[first:last] + offsets).view(-1)
        return out.index_add_(0, places, self.values[first:last].reshape(-1, self.shape[1]).to(out.dtype))

    def total(self, weights: Tensor, finite: Tensor | None, out: Tensor | None) -> Tensor:
        """Adds rows where they belong."""
        values = selected(self.values, finite) * weights.view(-1, 1, 1)
        out = values.new_zeros(self.shape) if out is None else out
        return out.index_add_(0, self.ids.reshape(-1), values.reshape(-1, self.shape[1]))


@dataclass
class Convolution(Part):
    """The weight of a convolution from its input and the gradient of its output."""

    module: Any
    x: Tensor
    grad: Tensor

    samples = property(lambda self: len(self.x))
    shape = property(lambda self: self.module.weight.shape)
    dtype = property(lambda self: self.x.dtype)
    terms = property(lambda self: math.prod(self.grad.shape[2:]))

    def formed(self) -> Part:
        """Held gradients where these take no more memory than input and output."""
        held = math.prod(self.shape) * self.samples <= self.x.numel() + self.grad.numel()
        return Dense(self.per_sample(0, self.samples)) if held else self

    @property
    def magnitudes(self) -> Tensor:
        """At most |x|·|grad| times the root of how often a window sees an element."""
        wide = scalar_dtype(self.x.device)
        seen = math.prod(self.module.kernel_size)
        return (reference.squares(self.x) * reference.squares(self.grad) * seen).sqrt().to(wide)

    def per_sample(self, first: int, last: int) -> Tensor:
        """Windows of the input, then a product of matrices for each group of each sample."""
        groups = self.module.groups
        x = self._padded(self.x[first:last].to(compute_dtype(self.dtype)))
        dimensions = x.dim() - 2
        geometry = zip(self.module.kernel_size, self.module.stride, self.module.dilation, strict=True)
        for i, (size, stride, dilation) in enumerate(geometry):
            x = x.unfold(2 + i, (size - 1) * dilation + 1, stride)[..., ::dilation]
        x = x.unflatten(1, (groups, -1))  # [samples, groups, channels, *positions, *kernel]
        places = [3 + i for i in range(dimensions)]
        kernel = [3 + dimensions + i for i in range(dimensions)]
        positions = math.prod(x.shape[3 : 3 + dimensions])
        window = math.prod(self.shape[1:])
        x = x.permute(0, 1, *places, 2, *kernel).reshape(last - first, groups, positions, window)
        grad = self.grad[first:last].to(x.dtype)
        grad = grad.reshape(last - first, groups, self.shape[0] // groups, positions)
        return (grad @ x).view(last - first, *self.shape)

    def _padded(self, x: Tensor) -> Tensor:
        mode = self.module.padding_mode
        pads = self.module._reversed_padding_repeated_twice
        return F.pad(x, pads, mode="constant" if mode == "zeros" else mode) if any(pads) else x

    def total(self, weights: Tensor, finite: Tensor | None, out: Tensor | None) -> Tensor:
        """The ordinary gradient of the weight, from a weighted gradient of the output."""
        x, grad, padding = selected(self.x, finite), selected(self.grad, finite), self.module.padding
        if self.module.padding_mode != "zeros" or isinstance(padding, str):
            x, padding = self._padded(x), (0,) * (x.dim() - 2)
        if not x.numel() or not grad.numel():
            return x.new_zeros(self.shape) if out is None else out
        _, value, _ = torch.ops.aten.convolution_backward(
            grad * _along(weights, grad), x, x.new_empty(self.shape), None, self.module.stride, padding,
            self.module.dilation, False, [0] * (x.dim() - 2), self.module.groups, (False, True, False),
        )  # fmt: skip
        return _added(value, out)


@dataclass
class Mixed(Part):
    """Several parts of one parameter."""

    parts: Sequence[Part]

    samples = property(lambda self: self.parts[0].samples)
    shape = property(lambda self: self.parts[0].shape)
    dtype = property(lambda self: self.parts[0].dtype)
    terms = property(lambda self: sum(part.terms + 1 for part in self.parts))

    @property
    def magnitudes(self) -> Tensor:
        """Of all of them; what is held counts with its norm."""
        norms = (part.squares()[0].sqrt() for part in self.parts if isinstance(part, Dense))
        return sum([part.magnitudes for part in self.parts]) + sum(norms)  # type: ignore[return-value]

    def per_sample(self, first: int, last: int) -> Tensor:
        """Their sum."""
        return sum(part.per_sample(first, last) for part in self.parts)  # type: ignore[return-value]

    def total(self, weights: Tensor, finite: Tensor | None, out: Tensor | None) -> Tensor:
        """Their sum."""
        for part in reversed(self.parts):  # embeddings at last: they add to what is there
            out = part.total(weights, finite, out)
        return out  # type: ignore[return-value]


@dataclass
class Tied(Mixed):
    """An embedding whose matrix is that of the output layer, too: the norm of neither is formed."""

    def squares(self) -> Squares:
        """‖E + H‖² = ‖E‖² + ‖H‖² + 2⟨E, H⟩ with ⟨E, H⟩ = Σ_ts left_s[ids_t]·⟨values_t, right_s⟩."""
        rows, outer = self.parts
        assert isinstance(rows, Rows) and isinstance(outer, Outer)
        compute, wide = compute_dtype(self.dtype), scalar_dtype(rows.values.device)
        (squares, error), (more, other) = rows.squares(), outer.squares()
        values, right = rows.values.to(compute), outer.right.to(compute)
        ids = rows.ids.unsqueeze(1).expand(-1, outer.left.shape[1], -1)
        chosen = outer.left.gather(2, ids).to(compute)  # [samples, s, t]
        cross = (chosen * torch.bmm(right, values.mT)).sum((1, 2))
        norms = (torch.linalg.vector_norm(x, dim=-1).unsqueeze(-1) for x in (right, values))
        largest = (chosen.abs() * torch.bmm(next(norms), next(norms).mT)).sum((1, 2)).to(wide)
        share = reference.rounding(values.shape[-1], self.dtype) + reference.rounding(self.terms, self.dtype)
        return squares + more + 2 * cross.to(wide), error + other + 2 * share * largest


def joined(parts: Sequence[Part]) -> Part:
    """All uses of one parameter as one part."""
    if len(parts) == 1:
        return parts[0]
    kinds = {kind: [part for part in parts if type(part) is kind] for kind in {type(part) for part in parts}}
    dense, outer, rows = (kinds.pop(kind, []) for kind in (Dense, Outer, Rows))
    together: list[Part] = []
    if dense:
        together.append(Dense(sum(part.values for part in dense)))  # type: ignore[attr-defined,arg-type]
    if rows:
        ids, values = (torch.cat([getattr(part, name) for part in rows], 1) for name in ("ids", "values"))
        together.append(Rows(ids, values, rows[0].shape[0]))
    if outer:
        together.append(Outer(*(torch.cat([getattr(p, n) for p in outer], 1) for n in ("left", "right"))))
    together += (part for rest in kinds.values() for part in rest)
    if len(together) == 1:
        return together[0]
    return Tied(together) if [type(part) for part in together] == [Rows, Outer] else Mixed(together)
