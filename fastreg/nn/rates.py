"""Rates as kernels take them: thresholds for 16 random bits, in tensors, so that no change compiles anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.dropout import LEVELS

Rate = float | Sequence[float] | Tensor
"""A rate in [0, 1], or one for each channel."""


def checked(p: Rate, name: str = "p") -> Rate:
    """The rate.

    Tensors that are elsewhere than on the CPU, or compiled code, would have to be waited for: there rates out
    of range count as 0 or 1.

    Raises:
        TypeError: If it is no rate at all.
        ValueError: If it is out of range, or a tensor or list of more than one dimension.
    """
    if isinstance(p, (int, float)):
        if not 0 <= p <= 1:
            raise ValueError(f"{name} must be a rate in [0, 1], got {p!r}")
        return p
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


def single(p: Rate, name: str = "p") -> float:
    """The rate, of which there must be one.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is out of range.
    """
    if not isinstance(p, (int, float)):
        raise TypeError(f"{name} must be one rate in [0, 1], got {p!r}")
    return float(checked(p, name))  # type: ignore[arg-type]


def thresholds(p: Rate, device: torch.device | None = None) -> Tensor:
    """Rates times 65536, rounded, as int32; only rates of 0 and 1 become 0 and 65536."""
    if isinstance(p, (int, float)):
        return torch.full((), threshold(p), dtype=torch.int32, device=device)
    rates = torch.as_tensor(p, dtype=torch.float64, device=device)
    levels = (rates * LEVELS).round().clamp(1, LEVELS - 1)
    return torch.where(rates <= 0, 0, torch.where(rates >= 1, LEVELS, levels)).to(torch.int32)


def threshold(p: float) -> int:
    """The same of one rate."""
    return 0 if p <= 0 else LEVELS if p >= 1 else min(max(round(p * LEVELS), 1), LEVELS - 1)
