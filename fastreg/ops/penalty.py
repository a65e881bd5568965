"""Σ p² and Σ |p| over many tensors as operators that have derivatives: one launch for each direction.

    fastreg::penalty            one read of all tensors; partial sums, added up in float64 in a fixed order
    fastreg::penalty_gradients  one read, one write: 2gp or g · sign(p), with g read on the device

A launch is for one dtype on one device; of these there are mostly as many as one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine import launch
from ..engine.batch import Batch, NormSpec
from ..engine.layout import laid_out, layout
from ..engine.stage import Chain, Stage
from ..engine.table import Table
from ..reference import penalty as reference
from ..reference.step import scalar_dtype
from ..runtime.device import capturing, stream

SUM = Chain(())
L2 = Chain((Stage("penalty.l2_gradient", reference.l2_gradient, device_scalars=("scale",)),))
L1 = Chain((Stage("penalty.l1_gradient", reference.l1_gradient, device_scalars=("scale",)),))
TABLES = 16
"""Lists of tensors whose tables are kept: a penalty is mostly over the same ones as a step before."""
UNSAFE = (torch.Tag.cudagraph_unsafe,)
"""`torch.compile(mode="reduce-overhead")` runs these operators outside of its graphs: a table that is kept
would lie in the graphs' memory, which counts what is alive in it."""


# Operators --------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastreg::penalty", mutates_args=(), tags=UNSAFE)
def penalty(tensors: Sequence[Tensor], absolute: bool) -> Tensor:
    """Σ p², or Σ |p|, over all elements of all tensors.

    Args:
        tensors: One or more of any real floating dtypes, shapes and devices.
        absolute: Which of both.

    Returns:
        0-d, on the device of the first tensor: float64 if any is, else float32.
    """
    totals: dict[torch.device, list[Batch]] = {}
    for _, own in _alike(tensors):
        totals.setdefault(own[0].device, []).append(_batch(SUM, own, own, []))
    found = []
    for device, batches in totals.items():
        limits = torch.ones(2, dtype=scalar_dtype(device), device=device)
        found.append(launch.measure(batches, limits, NormSpec(absolute=absolute))[1])
    home = tensors[0].device
    total = found[0] if len(found) == 1 else torch.stack([each.to(home) for each in found]).sum()
    return total.to(_result_dtype(tensors), copy=True)


@penalty.register_fake
def _(tensors: Sequence[Tensor], absolute: bool) -> Tensor:
    return torch.empty((), dtype=_result_dtype(tensors), device=tensors[0].device)


@torch.library.custom_op("fastreg::penalty_gradients", mutates_args=(), tags=UNSAFE)
def penalty_gradients(gradient: Tensor, tensors: Sequence[Tensor], absolute: bool) -> list[Tensor]:
    """The gradients of `penalty` by each tensor, with the gradient by its value, 0-d."""
    out: list[Any] = [torch.empty_like(tensor) for tensor in tensors]
    for where, own in _alike(tensors):
        device = own[0].device
        scale = gradient.to(device, scalar_dtype(device)) * (1 if absolute else 2)
        launch.run(_batch(L1 if absolute else L2, [out[i] for i in where], own, [scale]))
    return out


@penalty_gradients.register_fake
def _(gradient: Tensor, tensors: Sequence[Tensor], absolute: bool) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in tensors]


def _result_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def _alike(tensors: Sequence[Tensor]) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Tensors of one device and dtype, dense, and which ones these are."""
    kinds: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(i)
    for where in kinds.values():
        own = (tensors[i] for i in where)
        yield where, [t if t.is_contiguous() else laid_out(t, layout(t)) for t in own]


def _batch(chain: Chain, targets: list[Tensor], tensors: list[Tensor], device_scalars: list[Tensor]) -> Batch:
    """What writes to targets reads tensors as its gradients."""
    count = len(tensors)
    none = [0] * count
    return Batch(
        chain,
        targets,
        tensors,
        [],
        device_scalars,
        [],
        none,
        none,
        none,
        [1],
        [[]],
        table=_table(chain, tensors),
    )


def _table(chain: Chain, tensors: list[Tensor]) -> Table:
    device, dtype = tensors[0].device, tensors[0].dtype
    places = tuple(map(Tensor.data_ptr, tensors)), tuple(map(Tensor.numel, tensors))
    if capturing(device):
        return Table()
    return _kept(chain, device, dtype, places, stream(device))


@functools.lru_cache(maxsize=TABLES)
def _kept(*key: Any) -> Table:
    """What former calls with the same tensors on the same stream have left on the device."""
    return Table()


# Derivatives ------------------------------------------------------------------------------------------------


def sum_of_powers(tensors: Sequence[Tensor], absolute: bool) -> Tensor:
    """`fastreg::penalty` with derivatives of any order."""
    needed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if torch.compiler.is_compiling() and not needed:
        return penalty(tensors, absolute)  # Dynamo (torch 2.13) does not take its function here
    return _Penalty.apply(absolute, *tensors)


class _Penalty(torch.autograd.Function):
    """`fastreg::penalty` as a function of (absolute, *tensors)."""

    @staticmethod
    def forward(absolute: bool, *tensors: Tensor) -> Tensor:
        """Asks the operator."""
        return penalty(tensors, absolute)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the tensors, which are kept anyway."""
        ctx.absolute, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """One launch, too."""
        wanted = ctx.needs_input_grad[1:]
        tensors = [t for t, want in zip(ctx.saved_tensors, wanted, strict=True) if want]
        if torch.is_grad_enabled():
            found = iter(_Gradients.apply(ctx.absolute, gradient, *tensors))
        else:
            found = iter(penalty_gradients(gradient, tensors, ctx.absolute))
        return None, *(next(found) if want else None for want in wanted)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], absolute: bool, *tensors: Tensor) -> tuple[Tensor, int]:
        """A value for each sample."""
        each = [_first(t, dim, info.batch_size) for t, dim in zip(tensors, in_dims[1:], strict=True)]
        dtype = _result_dtype(tensors)
        sums = [torch.vmap(reference.penalty, (0, None))(t.to(dtype), absolute) for t in each]
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
        gradient = _first(gradient, in_dims[1], info.batch_size)
        found = []
        for t, dim in zip(tensors, in_dims[2:], strict=True):
            slope = _slope(_first(t, dim, info.batch_size), absolute)
            scale = gradient.to(t.device).view(-1, *[1] * (slope.dim() - 1))
            found.append((scale * slope).to(t.dtype))
        return tuple(found), (0,) * len(found)


def _slope(tensor: Tensor, absolute: bool) -> Tensor:
    return tensor.sign() if absolute else 2 * tensor


def _first(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    """With the samples along the first dimension."""
    return tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
