"""What launching kernels needs of a device: its architecture, uploads, streams and limits."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .launch_parameters import Architecture

MOST_PROGRAMS = 2**31 - 1
"""Programs of a launch. CUDA allows as many in the first dimension of a grid, 65 535 in the others."""
H200 = Architecture("sm_90", 32, 132)
"""What CPU tensors stand for, in Triton's interpreter and where kernels are only compiled."""

_captured: list[Tensor] = []
_assumed: Architecture | None = None


def architecture(device: torch.device) -> Architecture:
    """What kernels on a device are compiled for."""
    if device.type != "cuda":
        return _assumed or H200
    return _architecture(device)


@functools.cache
def _architecture(device: torch.device) -> Architecture:
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Architecture(found.gcnArchName.split(":")[0], found.warp_size, found.multi_processor_count)
    return Architecture(f"sm_{found.major}{found.minor}", 32, found.multi_processor_count)


@contextlib.contextmanager
def assumed(target: Architecture) -> Iterator[None]:
    """Within the block, CPU tensors stand for tensors of this architecture."""
    global _assumed
    before, _assumed = _assumed, target
    try:
        yield
    finally:
        _assumed = before


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Launch so many programs of a kernel on the current stream of a device.

    Nothing is launched for no programs.

    Raises:
        ValueError: For more programs than a GPU can launch at a time.
    """
    if not programs:
        return
    if programs > MOST_PROGRAMS:
        raise ValueError(
            f"{kernel.__name__} would take {programs} programs, a GPU launches at most {MOST_PROGRAMS} at a "
            "time: split the batch or the list of tensors"
        )
    with _current(device):
        kernel[(programs,)](*arguments, **constants)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within the block it is the current device, on which kernels are launched."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where it does not start at a multiple of 16 bytes.

    For kernels that take addresses as arguments: Triton would compile them anew for other alignments.
    """
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without waiting: the allocator of pinned memory keeps it while it is in use."""
    if device.type == "cpu":
        return host
    pinned = host.pin_memory()
    if capturing(device):
        keep(pinned)
    return pinned.to(device, non_blocking=True)


def keep(*tensors: Tensor) -> None:
    """Keep tensors for good, because every replay of the graph that is being captured reads them again."""
    _captured.extend(tensors)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream of a device.

    What is written to the device then is there only once the graph is replayed, and serves nobody else.
    """
    if device.type != "cuda":
        return False
    with _current(device):
        return torch.cuda.is_current_stream_capturing()


def stream(device: torch.device) -> Any:
    """The current stream of a device; `None` where it has none."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def triton_dtype(dtype: torch.dtype) -> Any:
    """What Triton calls a dtype."""
    tl = importlib.import_module("triton.language")
    name = str(dtype).removeprefix("torch.")
    return getattr(tl, {"double": "float64", "half": "float16"}.get(name, name))
