"""Runs a step over a batch, and reductions over batches, on the backend of the batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...reference import norm as reference_norm
from ...reference import units as reference_units
from ..batch import Batch, NormSpec, flat
from . import eager, triton


def run(batch: Batch) -> None:
    """Runs the step of a batch on its backend."""
    if batch.backend == "triton":
        triton.run(batch)
    elif batch.skip is None or not batch.skip.item():
        eager.run(batch)
    for original, dense in batch.copies:
        original.copy_(dense)


def measure(batches: Sequence[Batch], limits: Tensor, spec: NormSpec = NormSpec()) -> Tensor:  # noqa: B008
    """Returns `reference.norm.Measured` over batches of one device: `[5]`, float64, on that device.

    Args:
        batches: The gradients.
        limits: (max_norm, 1 / scale), float64, on the device.
        spec: The norm to measure.
    """
    largest = spec.kind == "largest"
    if all(batch.backend == "triton" for batch in batches):
        partial = torch.cat([triton.partial_norms(batch, spec) for batch in batches])
        return triton.clip_factor(partial, limits, largest)
    partial = torch.cat([eager.partial_norms(batch, spec) for batch in batches])
    return reference_norm.clip_factor(partial, limits, largest)


def combine(totals: Sequence[Tensor], limits: Tensor, largest: bool) -> Tensor:
    """Returns the result of `measure` from totals of several groups, 0-d on the device of `limits`."""
    return reference_norm.clip_factor(torch.stack(tuple(totals)), limits, largest)


def unit_squares(batch: Batch) -> Tensor:
    """Returns (Σ p², Σ g²) over every unit of every parameter: `[units, 2]`, in compute precision."""
    if batch.backend == "triton":
        return triton.unit_squares(batch)
    flats = (list(map(flat, tensors)) for tensors in (batch.parameters, batch.gradients))
    return torch.cat(list(map(reference_units.unit_squares, *flats, batch.unit_layouts)))
