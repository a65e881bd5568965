"""Controls the precision of matrix products in a block."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def full_precision_no_grad(device: torch.device) -> Iterator[None]:
    """Disables autograd, autocast and TF32-like products within the block."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        for setting in _PRODUCTS.get(device.type, ()):
            if setting.fp32_precision != "ieee":
                stack.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
                setting.fp32_precision = "ieee"
        yield


_PRODUCTS: dict[str, tuple[Any, ...]] = {
    "cuda": (torch.backends.cuda.matmul, torch.backends.cudnn.conv),  # type: ignore[attr-defined]
    "cpu": (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv),  # type: ignore[attr-defined]
}
