"""Makes the state buffers of parameters and step counts, and checks whether loaded state fits."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..reference.step import compute_dtype
from . import layout
from .component import Component
from .stage import Buffer, Chain, Storage

BACKUP = Buffer("sam_backup", "parameter", "parameter")
"""The weight as it was before it was perturbed."""


def buffer_dtype(
    chain: Chain, buffer: Buffer, parameter: Tensor, state_dtype: torch.dtype | None
) -> torch.dtype:
    """Returns the dtype of a buffer of a parameter.

    Args:
        chain: The stages that run over the parameter.
        buffer: One of the chain's buffers.
        parameter: The parameter; a complex one has complex buffers.
        state_dtype: The dtype that the user wants moments to be held in.
    """
    inner = layout.local(parameter).dtype
    dtype = buffer.dtype
    if dtype == "state":
        # With bf16 moments an exact weight gains nothing, so moments are float32.
        exact = chain.storage.buffers and inner == torch.bfloat16
        dtype = state_dtype or (torch.float32 if exact else inner)
    elif dtype == "parameter":
        dtype = inner
    elif dtype == "compute":
        dtype = compute_dtype(inner)
    return dtype.to_complex() if parameter.is_complex() and dtype.is_floating_point else dtype


def init_buffer(
    buffer: Buffer, parameter: Tensor, index: int, dtype: torch.dtype, components: Iterable[Component],
    group: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Returns a new buffer with its first content; `index` is that of the parameter in the optimizer.

    Of the components, the one whose stage or storage has the buffer for the group says what it starts as.
    """
    value = torch.empty_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
    for component in components:
        parts = component.stage(group), component.storage(group, layout.local(parameter).dtype)
        if any(part is not None and buffer in part.buffers for part in parts):
            if (initial := component.initial(buffer.name, index, parameter)) is not None:
                return value.copy_(initial)
    return value.copy_(parameter) if buffer.init == "parameter" else value.zero_()


def fitted(buffer: Buffer, parameter: Tensor, value: Tensor) -> Tensor:
    """Returns an existing buffer in the memory layout of its parameter.

    Raises:
        RuntimeError: If it has another shape or lies on another device.
    """
    if value.shape != parameter.shape or value.device != parameter.device:
        raise RuntimeError(
            f"state {buffer.name!r} has shape {tuple(value.shape)} on {value.device}, "
            f"its parameter {tuple(parameter.shape)} on {parameter.device}; move it back before step()"
        )
    if layout.is_dtensor(value):
        return value
    inner = parameter if parameter.is_complex() else layout.local(parameter)
    return layout.with_strides(value, layout.dense_strides(inner))


def from_backup(storage: Storage) -> Storage:
    """Returns the storage with the weight read from `BACKUP` instead of the parameter."""
    sources = tuple(BACKUP.name if source == "parameter" else source for source in storage.sources)
    return replace(storage, sources=sources, buffers=(*storage.buffers, BACKUP))
