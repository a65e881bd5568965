"""Helpers to launch kernels on a device: architecture, uploads, streams and limits."""

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .launch_parameters import Architecture, forget_launches

MOST_PROGRAMS = 2**31 - 1
"""Most programs in a launch: CUDA's limit for the first dimension of a grid; the others allow 65 535."""
H200 = Architecture("sm_90", 32, 132)
"""Architecture assumed for CPU tensors, in Triton's interpreter and where kernels are only compiled."""

_captured: list[Tensor] = []
_assumed: Architecture | None = None


def architecture(device: torch.device) -> Architecture:
    """Returns the architecture that kernels on a device are compiled for."""
    if device.type != "cuda":
        return _assumed or H200
    return _architecture(device)


@functools.cache
def _architecture(device: torch.device) -> Architecture:
    gpu = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Architecture(gpu.gcnArchName.split(":")[0], gpu.warp_size, gpu.multi_processor_count)
    return Architecture(f"sm_{gpu.major}{gpu.minor}", 32, gpu.multi_processor_count)


@contextlib.contextmanager
def assumed(target: Architecture) -> Iterator[None]:
    """Assumes another architecture for CPU tensors in the block."""
    before = _assumed
    _assume(target)
    try:
        yield
    finally:
        _assume(before)


def _assume(target: Architecture | None) -> None:
    global _assumed
    _assumed = target
    forget_launches()


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Launches a number of programs of a kernel on the current stream of a device.

    Zero programs are not launched, and more than a GPU can launch at a time are refused.
    """
    if not programs:
        return
    if programs > MOST_PROGRAMS:
        raise ValueError(
            f"{kernel.__name__} would take {programs} programs, a GPU launches at most {MOST_PROGRAMS} at a "
            "time: split the batch or the list of tensors"
        )
    # Kernels are launched on the current device.
    on_cpu = device.type == "cpu"
    with contextlib.nullcontext() if on_cpu else torch.get_device_module(device).device(device):
        kernel[(programs,)](*arguments, **constants)


def aligned(tensor: Tensor) -> Tensor:
    """Returns the tensor, or a copy if it does not start at a multiple of 16 bytes.

    For kernels that take addresses as arguments: Triton would compile them again for other alignments.
    """
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Copies to a device without waiting: the allocator of pinned memory keeps it while it is in use."""
    if device.type == "cpu":
        return host
    pinned = host.pin_memory()
    if capturing(device):
        keep(pinned)
    return pinned.to(device, non_blocking=True)


def keep(*tensors: Tensor) -> None:
    """Keeps tensors forever, because every replay of the graph that is being captured reads them again."""
    _captured.extend(tensors)


def capturing(device: torch.device) -> bool:
    """Returns whether a CUDA graph is being captured on the current stream of a device.

    Values written to the device during a capture exist only once the graph is replayed, so they must not be
    cached.
    """
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def stream(device: torch.device) -> Any:
    """Returns the current stream of a CUDA device, `None` for other devices."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def triton_dtype(dtype: torch.dtype) -> Any:
    """Returns Triton's dtype for one of torch."""
    tl = importlib.import_module("triton.language")
    name = str(dtype).removeprefix("torch.")
    return getattr(tl, {"double": "float64", "half": "float16"}.get(name, name))
