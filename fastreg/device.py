"""What launching a kernel takes to know of a device, and of Triton's names."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within the block it is the current device, on which kernels are launched."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device)


def warp() -> int:
    """How many lanes a warp has."""
    return 64 if torch.version.hip else 32


def triton_dtype(dtype: torch.dtype) -> Any:
    """What Triton calls a dtype."""
    tl = importlib.import_module("triton.language")
    name = str(dtype).removeprefix("torch.")
    return getattr(tl, {"double": "float64", "half": "float16"}.get(name, name))
