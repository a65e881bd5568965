"""Converts rates to thresholds for 16 random bits, in tensors, so that a new rate needs no compilation."""

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.validation import check_rate
from ..reference.dropout import DROP_LEVELS

Rate = float | Sequence[float] | Tensor
"""A rate in [0, 1], or one for each channel."""


def check_rates(p: Rate, name: str = "p") -> Rate:
    """Returns the rate, or the rates of the channels, if they are in [0, 1].

    Values on a device or in compiled code are not read: rates out of range count as 0 or 1 there.

    Raises:
        TypeError: If it is neither a number nor a list or tensor.
        ValueError: If it is out of range, or has more than one dimension.
    """
    if isinstance(p, numbers.Real):
        return check_rate(name, p)  # type: ignore[arg-type]
    if not isinstance(p, (Tensor, Sequence)) or isinstance(p, str):
        raise TypeError(f"{name} must be a rate in [0, 1], or a list or tensor of rates, got {p!r}")
    rates = torch.as_tensor(p)
    if rates.dim() > 1:
        raise ValueError(f"{name} must be a rate or one for each channel, got shape {tuple(rates.shape)}")
    if rates.device.type != "cpu" or torch.compiler.is_compiling():
        return p
    if not bool(((rates >= 0) & (rates <= 1)).all()):
        raise ValueError(f"{name} must be rates in [0, 1], got {p!r}")
    return p


def drop_thresholds(p: Rate, device: torch.device | None = None) -> Tensor:
    """Returns rates times 65536, rounded, as int32; only rates of 0 and 1 become 0 and 65536."""
    if isinstance(p, (int, float)):
        return torch.full((), drop_threshold(p), dtype=torch.int32, device=device)
    rates = torch.as_tensor(p, dtype=torch.float64, device=device)
    thresholds = (rates * DROP_LEVELS).round().clamp(1, DROP_LEVELS - 1)
    return torch.where(rates <= 0, 0, torch.where(rates >= 1, DROP_LEVELS, thresholds)).to(torch.int32)


def drop_threshold(p: float) -> int:
    """Returns what `drop_thresholds` does for a single rate, as an integer."""
    return 0 if p <= 0 else DROP_LEVELS if p >= 1 else min(max(round(p * DROP_LEVELS), 1), DROP_LEVELS - 1)
