"""Computes Σ p² and Σ |p| over many tensors and their derivatives, with one launch each.

    fastreg::penalty            one read of all tensors; partial sums, added up in float64 in a fixed order
    fastreg::penalty_gradients  one read, one write: 2gp or g · sign(p), with g read on the device

There is one launch for each (device, dtype), usually a single one.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine import launch
from ..engine.batch import Batch, NormSpec
from ..engine.layout import dense_strides, with_strides
from ..engine.stage import Chain, Stage
from ..engine.table import Table
from ..reference import penalty as reference
from ..reference.step import scalar_dtype
from ..runtime.device import capturing, stream

SUM = Chain(())
L2 = Chain((Stage("penalty.l2_gradient", reference.l2_gradient, device_scalars=("scale",)),))
L1 = Chain((Stage("penalty.l1_gradient", reference.l1_gradient, device_scalars=("scale",)),))
TABLES = 16
"""Cached tables of lists of tensors: most penalties are over the same tensors at every step."""
UNSAFE = (torch.Tag.cudagraph_unsafe,)
"""`torch.compile(mode="reduce-overhead")` runs these operators outside of its graphs: a cached table would
lie in the memory of the graphs, which expect no other live tensors there."""


# Operators --------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastreg::penalty", mutates_args=(), tags=UNSAFE)
def penalty(tensors: Sequence[Tensor], absolute: bool) -> Tensor:
    """Returns Σ p², or Σ |p| if `absolute`, over all elements of all tensors.

    Args:
        tensors: One or more, of any real floating dtypes, shapes and devices.
        absolute: Whether to sum absolute values.

    Returns:
        0-d, on the device of the first tensor: float64 if any is, else float32.
    """
    totals: dict[torch.device, list[Batch]] = {}
    for _, group in _by_kind(tensors):
        totals.setdefault(group[0].device, []).append(_batch(SUM, group, group, []))
    sums = []
    for device, batches in totals.items():
        limits = torch.ones(2, dtype=scalar_dtype(device), device=device)
        sums.append(launch.measure(batches, limits, NormSpec(kind="absolute" if absolute else "l2"))[1])
    home = tensors[0].device
    total = sums[0] if len(sums) == 1 else torch.stack([each.to(home) for each in sums]).sum()
    return total.to(_result_dtype(tensors), copy=True)


@penalty.register_fake
def _(tensors: Sequence[Tensor], absolute: bool) -> Tensor:
    return torch.empty((), dtype=_result_dtype(tensors), device=tensors[0].device)


@torch.library.custom_op("fastreg::penalty_gradients", mutates_args=(), tags=UNSAFE)
def penalty_gradients(gradient: Tensor, tensors: Sequence[Tensor], absolute: bool) -> list[Tensor]:
    """Returns the gradients of `penalty` with respect to each tensor, given that of its value, 0-d."""
    out: list[Any] = [torch.empty_like(tensor) for tensor in tensors]
    for indices, group in _by_kind(tensors):
        device = group[0].device
        scale = gradient.to(device, scalar_dtype(device)) * (1 if absolute else 2)
        launch.run(_batch(L1 if absolute else L2, [out[i] for i in indices], group, [scale]))
    return out


@penalty_gradients.register_fake
def _(gradient: Tensor, tensors: Sequence[Tensor], absolute: bool) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in tensors]


def _result_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def _by_kind(tensors: Sequence[Tensor]) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Yields indices and tensors of each device and dtype; the tensors are dense."""
    kinds: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(i)
    for indices in kinds.values():
        group = (tensors[i] for i in indices)
        yield indices, [t if t.is_contiguous() else with_strides(t, dense_strides(t)) for t in group]


def _batch(chain: Chain, targets: list[Tensor], tensors: list[Tensor], device_scalars: list[Tensor]) -> Batch:
    """Returns a batch that reads tensors as gradients and writes to targets."""
    device, dtype, zeros = tensors[0].device, tensors[0].dtype, [0] * len(tensors)
    key = chain, device, dtype, tuple(map(Tensor.data_ptr, tensors)), tuple(map(Tensor.numel, tensors))
    table = Table() if capturing(device) else _cached_table(*key, stream(device))
    return Batch(chain, targets, tensors, [], device_scalars, [], zeros, zeros, zeros, [1], [[]], table=table)


@functools.lru_cache(maxsize=TABLES)
def _cached_table(*key: Any) -> Table:
    """Returns the table of earlier calls with the same tensors on the same stream."""
    return Table()


# Derivatives ------------------------------------------------------------------------------------------------


def sum_of_powers(tensors: Sequence[Tensor], absolute: bool) -> Tensor:
    """Returns `fastreg::penalty` with derivatives of any order."""
    needed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if torch.compiler.is_compiling() and not needed:
        return penalty(tensors, absolute)  # Dynamo (torch 2.13) does not support the function here
    return _Penalty.apply(absolute, *tensors)


class _Penalty(torch.autograd.Function):
    """`fastreg::penalty` as a function of (absolute, *tensors)."""

    @staticmethod
    def forward(absolute: bool, *tensors: Tensor) -> Tensor:
        return penalty(tensors, absolute)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.absolute, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        tensors = [t for t, need in zip(ctx.saved_tensors, needed, strict=True) if need]
        if torch.is_grad_enabled():
            gradients = iter(_Gradients.apply(ctx.absolute, gradient, *tensors))
        else:
            gradients = iter(penalty_gradients(gradient, tensors, ctx.absolute))
        return None, *(next(gradients) if need else None for need in needed)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], absolute: bool, *tensors: Tensor) -> tuple[Tensor, int]:
        batched = [
            _samples_first(t, dim, info.batch_size) for t, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        dtype = _result_dtype(tensors)
        sums = [torch.vmap(reference.penalty, (0, None))(t.to(dtype), absolute) for t in batched]
        return torch.stack(sums).sum(0), 0


class _Gradients(torch.autograd.Function):
    """`fastreg::penalty_gradients` as a function of (absolute, gradient, *tensors)."""

    @staticmethod
    def forward(absolute: bool, gradient: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(penalty_gradients(gradient, tensors, absolute))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.absolute, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient, *tensors = ctx.saved_tensors
        total = torch.zeros_like(gradient)
        for g, t in zip(gradients, tensors, strict=True):
            total = total + (g * _slope(t, ctx.absolute)).sum(dtype=gradient.dtype).to(gradient.device)
        if ctx.absolute:
            return None, total, *(None for _ in tensors)
        return None, total, *((2 * gradient.to(g.device) * g).to(g.dtype) for g in gradients)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], absolute: bool, gradient: Tensor, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        gradient = _samples_first(gradient, in_dims[1], info.batch_size)
        gradients = []
        for t, dim in zip(tensors, in_dims[2:], strict=True):
            slope = _slope(_samples_first(t, dim, info.batch_size), absolute)
            scale = gradient.to(t.device).view(-1, *[1] * (slope.dim() - 1))
            gradients.append((scale * slope).to(t.dtype))
        return tuple(gradients), (0,) * len(gradients)


def _slope(tensor: Tensor, absolute: bool) -> Tensor:
    return tensor.sign() if absolute else 2 * tensor


def _samples_first(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    return tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
