"""Controls the precision of matrix products in a block."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


class full_precision_no_grad(contextlib.ExitStack):  # noqa: N801  (used like a function)
    """Disables autograd, autocast and TF32-like products within the block."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._kind = device.type

    def __enter__(self) -> full_precision_no_grad:
        super().__enter__()
        self.enter_context(torch.no_grad())
        if torch.is_autocast_enabled(self._kind):
            self.enter_context(torch.autocast(self._kind, enabled=False))
        for setting in _PRODUCTS.get(self._kind, ()):
            if setting.fp32_precision != "ieee":
                self.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
                setting.fp32_precision = "ieee"
        return self


_PRODUCTS: dict[str, tuple[Any, ...]] = {
    "cuda": (torch.backends.cuda.matmul, torch.backends.cudnn.conv),  # type: ignore[attr-defined]
    "cpu": (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv),  # type: ignore[attr-defined]
}
