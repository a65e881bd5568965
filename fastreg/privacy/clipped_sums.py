"""Measures per-sample gradients and adds up what clipping leaves of them.

Many small operations are joined to few large ones. `clip_and_sum` is for materialized gradients.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..ops.ghost import Grams, ghost_sums
from ..reference import ghost as reference
from ..reference.step import compute_dtype, scalar_dtype
from .mixed_grads import join_grads
from .per_sample_grads import ConvGrad, DenseGrad, OuterProductGrad, PerSampleGrad, Squares, StackedGrad
from .precision import full_precision_no_grad


class MeasuredGrad(NamedTuple):
    """Per-sample gradients with the reductions computed while they were in the cache."""

    grad: PerSampleGrad
    ghost_sums: Tensor | None = None
    squares: Squares | None = None


def measure(grad: PerSampleGrad, grams: Grams) -> MeasuredGrad:
    """Returns gradients of a parameter's only use in their cheapest form, with what their norms need."""
    grad = grad.materialized() if isinstance(grad, OuterProductGrad | ConvGrad) else grad
    if isinstance(grad, OuterProductGrad) and grad.uses_ghost_norm:
        return MeasuredGrad(grad, ghost_sums(grad.left, grad.right, grams))
    return MeasuredGrad(grad) if is_small(grad) else MeasuredGrad(grad, squares=grad.squares())


def is_small(grad: PerSampleGrad) -> bool:
    """Returns whether gradients are small enough to be stacked with those of other parameters."""
    return isinstance(grad, DenseGrad) and grad.values[:1].numel() <= reference.SHORT


def group_grads(
    uses: dict[Parameter, list[MeasuredGrad]], stack: bool
) -> tuple[list[list[Parameter]], list[MeasuredGrad]]:
    """Joins the uses of each parameter, and stacks small gradients of several parameters if asked to.

    Returns:
        Lists of the same length: the parameters that share a gradient, and that gradient.
    """
    owners: list[list[Parameter]] = []
    grads: list[MeasuredGrad] = []
    small: dict[Any, list[tuple[Parameter, Any]]] = {}
    for p, measured in uses.items():
        joined = measured[0] if len(measured) == 1 else MeasuredGrad(join_grads([m.grad for m in measured]))
        if stack and is_small(joined.grad):
            small.setdefault((p.device, joined.grad.dtype, p.dtype), []).append((p, joined.grad))
        else:
            owners.append([p])
            grads.append(joined)
    for pairs in small.values():
        params, dense = zip(*pairs, strict=True)
        owners.append(list(params))
        grads.append(MeasuredGrad(dense[0] if len(dense) == 1 else StackedGrad.of(dense)))
    return owners, grads


def squared_norms(measured: Sequence[MeasuredGrad], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns squared norms and bounds on how much too small they are, `[grads, samples]` each in float64."""
    results: list[Squares | None] = [m.squares for m in measured]
    ghosts: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, (grad, sums, squares) in enumerate(measured):
        if sums is not None:
            ghosts.setdefault((sums.device, grad.dtype), []).append(i)
        elif squares is None:
            results[i] = grad.squares()
    for (_, dtype), indices in ghosts.items():
        grads = [measured[i].grad for i in indices]
        stacked = torch.stack([measured[i].ghost_sums for i in indices])  # type: ignore[misc]
        terms, shapes = [grad.terms for grad in grads], [grad.shape for grad in grads]
        pair = reference.ghost_squares(stacked, terms, shapes, dtype)
        for i, squares, error in zip(indices, *(result.unbind() for result in pair), strict=True):
            results[i] = squares, error
    wide, columns = scalar_dtype(device), zip(*(pair for pair in results if pair is not None), strict=True)
    return tuple(torch.stack([t.to(device, wide) for t in column]) for column in columns)  # type: ignore[return-value]


def add_weighted_sums(
    owners: list[list[Parameter]], measured: list[MeasuredGrad], weights: Tensor, finite: Tensor | None
) -> None:
    """Adds weighted sums of per-sample gradients to `p.grad` of the parameters that own them.

    Args:
        owners: Parameters of each gradient.
        measured: The gradients; the list is emptied, so that memory is released along the way.
        weights: `[1, samples]`, or `[grads, samples]` if each is clipped by itself; float64.
        finite: `[samples]`, False for samples that are excluded; `None` if there are none.
    """
    cast: dict[Any, Tensor] = {}
    measured.reverse()
    for i, params in enumerate(owners):
        grad = measured.pop().grad
        key = row, device, dtype = min(i, len(weights) - 1), params[0].device, compute_dtype(params[0].dtype)
        if key not in cast:
            cast[key] = weights[row].to(device, dtype)
        included = None if finite is None else finite.to(device)
        out = params[0].grad
        if len(params) == 1 and out is not None and out.dtype == dtype and out.is_contiguous():
            grad.weighted_sum(cast[key], included, out)
            continue
        total = grad.weighted_sum(cast[key], included, None)
        sizes = grad.sizes if isinstance(grad, StackedGrad) else [total.numel()]
        del grad
        for p, value in zip(params, total.split(sizes) if len(params) > 1 else [total], strict=True):
            value = value.view(p.shape)
            if p.grad is not None and p.grad.dtype == value.dtype:
                p.grad.add_(value)
            else:
                p.grad = value if p.grad is None else value + p.grad


class Clipped(NamedTuple):
    """Norms and clip factors, float64: `[1, samples]`, or `[tensors, samples]` if each is clipped alone."""

    norms: Tensor
    factors: Tensor


def clip_and_sum(samples: Sequence[Tensor], out: Sequence[Tensor], max_norms: Sequence[float]) -> Clipped:
    """Clips materialized per-sample gradients and adds the sums over samples to `out`.

    A norm that is too small would clip a sample too little, and squares of large gradients overflow float32:
    norms are computed in double.  Factors are min(C / (norm + 1e-6), 1)  (Abadi et al. 2016), or 0, which
    excludes the sample, if its norm is not finite or so large that the factor underflows float32.

    Args:
        samples: Gradients of each tensor, `[samples, *shape]`, of the same samples in the same order.
        out: `[*shape]` each, contiguous.
        max_norms: The largest norm C over all tensors, one number, or that of each tensor.
    """
    home = out[0].device
    with full_precision_no_grad(home):
        pairs = list(zip(samples, out, strict=True))
        squares = torch.stack([_squares_in_double(*pair).to(home) for pair in pairs])
        limits = torch.tensor(max_norms, dtype=squares.dtype, device=home).unsqueeze(1)
        norms = (squares if len(limits) > 1 else squares.sum(0, keepdim=True)).sqrt()
        factors = (limits / (norms + 1e-6)).clamp(max=1.0)
        included = (norms < torch.inf) & (factors >= torch.finfo(torch.float32).tiny)
        factors = torch.where(included, factors, 0.0)
        masks = None if bool(included.all()) else included
        for i, (tensor, total) in enumerate(pairs):
            row = min(i, len(factors) - 1)
            weights = factors[row].to(tensor.device, compute_dtype(tensor.dtype))
            mask = None if masks is None else masks[row].to(tensor.device)
            for part, sums in _columns(tensor, total):
                DenseGrad(part).weighted_sum(weights, mask, sums)
    return Clipped(norms, factors)


def _squares_in_double(samples: Tensor, out: Tensor) -> Tensor:
    """Returns Σ g² of every sample, `[samples]`; in float32 on devices without float64."""
    squares = samples.new_zeros(len(samples), dtype=scalar_dtype(samples.device))
    for part, _ in _columns(samples, out):
        squares += torch.linalg.vector_norm(part, dim=1, dtype=squares.dtype).square()
    return squares


def _columns(samples: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields columns of `[samples, *shape]` and of `[*shape]`, few enough to be copied in double."""
    rows = samples.reshape(len(samples), out.numel())
    most = 2**20 if samples.device.type == "cpu" else 2**24  # larger copies would leave the cache of a CPU
    width = max(1, most // max(1, len(rows)))
    return zip(rows.split(width, 1), out.view(-1).split(width), strict=True)
