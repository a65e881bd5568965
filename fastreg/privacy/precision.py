"""How precise products of matrices are."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


class plainly(contextlib.ExitStack):  # noqa: N801  (used like a function)
    """Within the block nothing is recorded, and products are as precise as their factors."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._kind = device.type

    def __enter__(self) -> plainly:
        super().__enter__()
        self.enter_context(torch.no_grad())
        if torch.is_autocast_enabled(self._kind):
            self.enter_context(torch.autocast(self._kind, enabled=False))
        for place in _PRODUCTS.get(self._kind, ()):
            if place.fp32_precision != "ieee":
                self.callback(setattr, place, "fp32_precision", place.fp32_precision)
                place.fp32_precision = "ieee"
        return self


_PRODUCTS: dict[str, tuple[Any, ...]] = {
    "cuda": (torch.backends.cuda.matmul, torch.backends.cudnn.conv),  # type: ignore[attr-defined]
    "cpu": (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv),  # type: ignore[attr-defined]
}
