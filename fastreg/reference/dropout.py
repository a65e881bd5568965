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

ROUNDS = 7
"""Rounds of Philox: the fewest that its authors found to pass all tests of randomness."""
DROP_LEVELS = 65536
"""The threshold that drops everything: rates are multiples of one over it."""


def dropout(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | int, drop_thresholds: Tensor,
    at: PhiloxPosition, activation: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Computes bias, activation, dropout and residual of flat tensors, in this order.

    Tensors are `[n]`, a bias also 0-d.  Thresholds are int32, 0-d or `[n]`: rates times 65536.  The seed has
    64 bits.  The activation is a name of `ACTIVATIONS`, and `dtype` that of the result.
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
    """Returns the gradient by x of `dropout`, for that by its result.

    It is the derivative of the activation times the gradient, dropped and scaled.
    """
    h = _biased(x, bias, dtype)
    g = ACTIVATIONS[activation].backward(gradient.to(h.dtype), h)
    return _drop(g, seed, drop_thresholds, at).to(dtype)


def _biased(x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns x + bias in the precision of the arithmetic, see `reference.step.compute_dtype`."""
    compute = torch.promote_types(dtype, torch.float32)
    return x.to(compute) if bias is None else x.to(compute) + bias.to(compute)


def _drop(x: Tensor, seed: Tensor | int, drop_thresholds: Tensor, at: PhiloxPosition) -> Tensor:
    """Drops elements of x, and scales the others by one over the share that is kept."""
    scale = DROP_LEVELS / (DROP_LEVELS - drop_thresholds).to(x.dtype)
    return torch.where(reaches16(seed, at, x, drop_thresholds, ROUNDS), x * scale, 0)


def spread(values: Tensor, inner: int | Tensor, first: int, count: int) -> Tensor:
    """Returns the value of each element of a run: that of its channel, or the value of all.

    Values are `[channels]` or 0-d; `inner` elements follow each other in a channel.  The run has `count`
    elements from index `first` on.
    """
    if not values.dim():
        return values
    index = torch.arange(first, first + count, device=values.device)
    return values[index // inner % len(values)]
