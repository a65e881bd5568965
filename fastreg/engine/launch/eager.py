"""Runs a batch by the reference: in plain PyTorch, or compiled by `torch.compile`."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...reference import norm as reference_norm
from ...reference import units as reference_units
from ...reference.random import PhiloxPosition
from ...reference.step import CHUNK, run_stages, scalar_dtype
from ...reference.step import step as reference_step
from ...runtime import backend
from ..batch import Batch, NormSpec, flat
from .compiled import compiled_norm, compiled_step


class _Slice(NamedTuple):
    """Consecutive elements of one parameter, and the arguments of the reference for it."""

    tensors: list[Tensor]  # parameter, gradient, buffers, units
    device_scalars: Tensor
    rng_keys: Sequence[Tensor]
    step_scalars: Tensor
    first: int
    stream: int
    step: int


def run(batch: Batch) -> None:
    """Runs the step of a batch in PyTorch."""
    chain = batch.chain
    # Only random numbers need elements in whole groups, and only their temporaries make short runs pay.
    slices = list(_slices(batch, chain.random))
    _run_slices(batch, slices, compiled_step, (chain,), functools.partial(reference_step, chain))


def partial_norms(batch: Batch, spec: NormSpec) -> Tensor:
    """Returns partial sums, or the largest of each, by the reference or its compiled form."""
    stages, chain = spec.num_stages(batch.chain), batch.chain
    if not stages:
        return reference_norm.partial_norms(map(flat, batch.gradients), spec.kind, batch.device)

    def plain(*arguments: Any) -> Tensor:
        _, u = run_stages(stages, False, chain, *arguments)
        u = u[1] if spec.kind == "momentum" else u
        parts = reference_norm.partial_norms([u], spec.kind, batch.device)
        return parts.amax() if spec.kind == "largest" else parts.sum()

    slices = list(_slices(batch, True))
    norms = _run_slices(batch, slices, compiled_norm, (chain, stages, spec.kind), plain)
    scalar = scalar_dtype(batch.device)
    return torch.stack(norms).to(scalar) if norms else torch.zeros(1, dtype=scalar, device=batch.device)


def _run_slices(
    batch: Batch, slices: list[_Slice], compiled: Callable[..., Any], arguments: tuple[Any, ...],
    plain: Callable[..., Any],
) -> list[Any]:  # fmt: skip
    """Returns the result of each slice, compiled if the backend is and the slice can be."""
    chain, dtype = batch.chain, batch.compute
    fused = None
    if batch.backend == "compiled":
        try:
            dtypes = (*batch.dtypes, *[dtype] * len(chain.units))
            fused = compiled(*arguments, dtypes, dtype, batch.device, torch.get_num_threads())
        except Exception as error:
            backend.cannot_compile(error)
            batch.backend = "reference"
    if fused is not None and slices:
        integers = torch.tensor(
            [[part.first, part.stream, part.step, *batch.rng_keys] for part in slices], device=batch.device
        ).unbind()
    results = []
    for i, part in enumerate(slices):
        if fused is not None and part.tensors[0].numel() > 1 and not (chain.random and part.first % 8):
            results.append(fused(part.tensors, part.device_scalars, integers[i], part.step_scalars))
        else:
            results.append(plain(*_arguments(batch, part)))
    return results


def _slices(batch: Batch, chunked: bool) -> Iterator[_Slice]:
    chain, dtype, count = batch.chain, batch.compute, len(batch.parameters)
    rows = torch.as_tensor(batch.step_scalars, dtype=dtype, device=batch.device).unbind()
    steps = batch.steps if isinstance(batch.steps, list) else batch.steps.tolist()
    rng_keys = torch.tensor(batch.rng_keys, dtype=torch.int64, device=batch.device).unbind()
    columns = [scalar.expand(count).to(dtype) for scalar in batch.device_scalars]
    device_scalars = (
        torch.stack(columns, 1) if columns else torch.empty(count, 0, dtype=dtype, device=batch.device)
    ).unbind()
    for i, (parameter, first) in enumerate(zip(batch.parameters, batch.firsts, strict=True)):
        tensors = [flat(t) for t in (parameter, batch.gradients[i], *(b[i] for b in batch.buffers))]
        if chain.units:
            counts = [units.count for units in batch.unit_layouts]
            for values in batch.table.units_of(batch):
                part = values.split(counts)[i]
                tensors.append(reference_units.spread(part, batch.unit_layouts[i], tensors[0].numel()))
        row, elements = batch.rows[i], parameter.numel()
        for start, stop in _slice_bounds(elements, first) if chunked else [(0, elements)]:
            if stop > start:
                yield _Slice(
                    tensors if stop - start == elements else [t[start:stop] for t in tensors],
                    device_scalars[i], rng_keys, rows[row], first + start, batch.streams[i], steps[row],
                )  # fmt: skip


def _arguments(batch: Batch, part: _Slice) -> tuple[Any, ...]:
    """Returns the arguments of `reference.step` after the chain."""
    parameter, gradient, *others = part.tensors
    buffers = len(batch.buffers)
    at = PhiloxPosition(part.first - part.first % 8, part.first % 8, part.stream, part.step)
    scalars = part.device_scalars.unbind(), part.rng_keys, part.step_scalars.unbind()
    return parameter, gradient, others[:buffers], others[buffers:], *scalars, at


def _slice_bounds(count: int, first: int) -> Iterable[tuple[int, int]]:
    """Yields slices of at most `CHUNK` elements; all but the first start at a global multiple of 8."""
    head = min(-first % 8, count)
    if head:
        yield 0, head
    for start in range(head, count, CHUNK):
        yield start, min(start + CHUNK, count)
