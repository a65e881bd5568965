"""Dropout (Srivastava et al. 2014), and what is fused around it.

Whether an element stays is a function of (seed, its index) alone: its 16 random bits against a threshold of
rate · 65536.  Nothing is stored for the backward pass, which asks again.  What stays is scaled by one over
the share that stays of the rate as it is realised, so that the mean is kept to the last bit of the threshold.
What is dropped is 0, whatever it was: also where it was infinite or NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .random import PhiloxPosition, reaches16
from .step import compute_dtype

ROUNDS = 7
"""Of Philox: the fewest that its authors found to pass all tests of randomness."""
LEVELS = 65536
"""Thresholds there are, but for the one that drops everything."""


def kept(seed: Tensor | int, thresholds: Tensor, at: PhiloxPosition, like: Tensor) -> Tensor:
    """Which elements stay: a bool for each of the flat tensor `like`.

    Args:
        seed: 64 bits, as an int64 tensor or an integer.
        thresholds: int32, 0-d or for each element: rates times 65536.
        at: Where the elements lie.
        like: As many elements.
    """
    return reaches16(seed, at, like, thresholds, ROUNDS)


def scale(thresholds: Tensor, dtype: torch.dtype) -> Tensor:
    """One over the share that stays."""
    return LEVELS / (LEVELS - thresholds).to(dtype)


def dropout(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | int, thresholds: Tensor,
    at: PhiloxPosition, activation: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Bias, activation, dropout and residual, of flat tensors: activation(x + bias) is dropped.

    Args:
        x: `[n]`.
        bias: `[n]`, for every element its own.
        residual: `[n]`.
        seed: 64 bits, as an int64 tensor or an integer.
        thresholds: int32, 0-d or `[n]`.
        at: Where the elements lie.
        activation: A name of `ACTIVATIONS`.
        dtype: Of the result.
    """
    compute = compute_dtype(dtype)
    h = x.to(compute) if bias is None else x.to(compute) + bias.to(compute)
    y = ACTIVATIONS[activation].function(h) * scale(thresholds, compute)
    y = torch.where(kept(seed, thresholds, at, x), y, 0)
    return (y if residual is None else residual.to(compute) + y).to(dtype)


def dropout_backward(
    gradient: Tensor, x: Tensor, bias: Tensor | None, seed: Tensor | int, thresholds: Tensor,
    at: PhiloxPosition, activation: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The gradient by x: that of the result times the derivative of the activation, dropped and scaled.

    Args:
        gradient: `[n]`, of the result.
        x: `[n]`.
        bias: As in `dropout`.
        seed: Likewise.
        thresholds: Likewise.
        at: Likewise.
        activation: Likewise.
        dtype: Of the result.
    """
    compute = compute_dtype(dtype)
    h = x.to(compute) if bias is None else x.to(compute) + bias.to(compute)
    g = ACTIVATIONS[activation].backward(gradient.to(compute), h) * scale(thresholds, compute)
    return torch.where(kept(seed, thresholds, at, x), g, 0).to(dtype)


def spread(values: Tensor, inner: int | Tensor, first: int, count: int) -> Tensor:
    """For each of a run of elements the value of its channel.

    Args:
        values: `[channels]`.
        inner: Elements that follow each other in a channel.
        first: Index of the first element.
        count: How many elements.
    """
    index = torch.arange(first, first + count, device=values.device)
    return values[index // inner % len(values)]
