"""Scalars that stages read, kept on each device where parameters are."""

from typing import Any

import torch
from torch import Tensor

from ..reference.step import scalar_dtype


class DeviceScalars(dict[torch.device, Tensor]):
    """Scalars with the same first values on every device, made when a device is first used.

    Copies and pickles start anew.

    Args:
        initial: What they are at first: one for a 0-d tensor, several for `[n]`.
    """

    def __init__(self, *initial: float) -> None:
        super().__init__()
        self.initial = initial

    def __missing__(self, device: torch.device) -> Tensor:
        """Returns the scalars of a device where there have been none."""
        values = self.initial if len(self.initial) > 1 else self.initial[0]
        return self.setdefault(device, torch.tensor(values, dtype=scalar_dtype(device), device=device))

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns what makes scalars of the same initial values."""
        return DeviceScalars, self.initial


NO_CLIPPING = DeviceScalars(torch.inf, 1.0)
"""The (max_norm, 1 / scale) of a norm that nothing is clipped or scaled by."""
