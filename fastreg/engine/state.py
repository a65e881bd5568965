"""The state buffers of a parameter: what they hold, how they start, and whether what was loaded fits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..reference.step import compute_dtype
from . import layout as placement
from .component import Component
from .stage import Buffer, Chain

BACKUP = Buffer("sam_backup", "parameter", "parameter")
"""The weight as it was before it was perturbed."""


def buffer_dtype(
    chain: Chain, buffer: Buffer, parameter: Tensor, state_dtype: torch.dtype | None
) -> torch.dtype:
    """What a buffer of a parameter holds.

    Args:
        chain: What is done to the parameter.
        buffer: One of the chain's.
        parameter: The parameter; a complex one has complex buffers.
        state_dtype: What the user wants moments to be held in.
    """
    inner = placement.local(parameter).dtype
    dtype = buffer.dtype
    if dtype == "state":
        # An exact weight is worth little beside moments that lose their small changes.
        exact = chain.storage.buffers and inner == torch.bfloat16
        dtype = state_dtype or (torch.float32 if exact else inner)
    elif dtype == "parameter":
        dtype = inner
    elif dtype == "compute":
        dtype = compute_dtype(inner)
    return dtype.to_complex() if parameter.is_complex() and dtype.is_floating_point else dtype


def start(
    buffer: Buffer, parameter: Tensor, index: int, dtype: torch.dtype, components: Iterable[Component]
) -> Tensor:
    """A new buffer with its first content; `index` is the place of the parameter in the optimizer."""
    made = torch.empty_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
    for component in components:
        if (given := component.initial(buffer.name, index, parameter)) is not None:
            return made.copy_(given)
    return made.copy_(parameter) if buffer.start == "parameter" else made.zero_()


def fitted(buffer: Buffer, parameter: Tensor, value: Tensor) -> Tensor:
    """A buffer that is there, in the layout of its parameter.

    Raises:
        RuntimeError: If it has another shape or lies on another device.
    """
    if value.shape != parameter.shape or value.device != parameter.device:
        raise RuntimeError(
            f"state {buffer.name!r} has shape {tuple(value.shape)} on {value.device}, "
            f"its parameter {tuple(parameter.shape)} on {parameter.device}; move it back before step()"
        )
    if placement.is_dtensor(value):
        return value
    inner = parameter if parameter.is_complex() else placement.local(parameter)
    return placement.laid_out(value, placement.layout(inner))
