"""Computes dropout (Srivastava et al. 2014), and what is fused around it, in plain PyTorch.

Whether an element is kept is a function of (seed, its index) alone: its 16 random bits are compared with a
threshold of rate · 65536.  Nothing is stored for the backward pass, which computes the mask again.  Kept
elements are scaled by one over the share kept at the rounded rate, so that the mean is preserved exactly.
A dropped element is 0 even if it was infinite or NaN.
"""

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .random import PhiloxPosition, reaches16
from .step import compute_dtype

ROUNDS = 7
"""Rounds of Philox: the fewest that its authors found to pass all tests of randomness."""
DROP_LEVELS = 65536
"""The threshold that drops everything: rates are multiples of one over it."""


def dropout(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | int, drop_thresholds: Tensor,
    at: PhiloxPosition, activation: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Computes bias, activation, dropout and residual of flat tensors, in this order.

    Args:
        x: `[n]`.
        bias: `[n]` or 0-d.
        residual: `[n]`.
        seed: 64 bits, as an int64 tensor or an integer.
        drop_thresholds: int32, 0-d or `[n]`: rates times 65536.
        at: Position of the elements.
        activation: A name of `ACTIVATIONS`.
        dtype: Of the result.
    """
    h = _biased(x, bias, dtype)
    if activation != "identity":
        h = ACTIVATIONS[activation].function(h)
    y = _drop(h, seed, drop_thresholds, at)
    return (y if residual is None else residual.to(y.dtype) + y).to(dtype)


def dropout_backward(
    gradient: Tensor, x: Tensor, bias: Tensor | None, seed: Tensor | int, drop_thresholds: Tensor,
    at: PhiloxPosition, activation: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Returns the gradient by x: the derivative of the activation times the gradient, dropped and scaled.

    Args:
        gradient: `[n]`, by the result.
        x: `[n]`.
        bias: See `dropout`.
        seed: See `dropout`.
        drop_thresholds: See `dropout`.
        at: See `dropout`.
        activation: See `dropout`.
        dtype: Of the result.
    """
    h = _biased(x, bias, dtype)
    g = ACTIVATIONS[activation].backward(gradient.to(h.dtype), h)
    return _drop(g, seed, drop_thresholds, at).to(dtype)


def _biased(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns x + bias in the precision of the arithmetic."""
    compute = compute_dtype(dtype)
    return x.to(compute) if bias is None else x.to(compute) + bias.to(compute)


def _drop(x: Tensor, seed: Tensor | int, drop_thresholds: Tensor, at: PhiloxPosition) -> Tensor:
    """Drops elements of x, and scales the others by one over the share that is kept."""
    scale = DROP_LEVELS / (DROP_LEVELS - drop_thresholds).to(x.dtype)
    return torch.where(reaches16(seed, at, x, drop_thresholds, ROUNDS), x * scale, 0)


def spread(values: Tensor, inner: int | Tensor, first: int, count: int) -> Tensor:
    """Returns the value of each element of a run: that of its channel, or the value of all.

    Args:
        values: `[channels]` or 0-d.
        inner: Elements that follow each other in a channel.
        first: Index of the first element.
        count: How many elements.
    """
    if not values.dim():
        return values
    index = torch.arange(first, first + count, device=values.device)
    return values[index // inner % len(values)]
