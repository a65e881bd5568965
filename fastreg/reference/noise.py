"""Computes noise on activations, added to each element or multiplied with it, in plain PyTorch.

The noise of an element is a function of (seed, its index) alone, so that nothing is stored for the backward
pass: added noise passes gradients on unchanged, a factor is drawn again.
"""

import torch
from torch import Tensor

from .random import PhiloxPosition, bits16, normal
from .step import compute_dtype

KINDS = ("additive", "multiplicative", "uniform")
"""x + scale · N(0, 1), x · (1 + scale · N(0, 1)), and x + scale · U(-1, 1)."""

ROUNDS = 7
"""Rounds of Philox, as for masks: see `dropout`."""


def symmetric(seed: Tensor | int, at: PhiloxPosition, like: Tensor) -> Tensor:
    """Draws a uniform float32 in (-1, 1), an odd multiple of 2⁻¹⁶, for each element of the flat `like`."""
    return bits16(seed, at, like, ROUNDS).float() * 2.0**-15 + (2.0**-16 - 1.0)


def noise(x: Tensor, seed: Tensor | int, scale: Tensor, at: PhiloxPosition, kind: str) -> Tensor:
    """Adds noise of one of `KINDS` to x, or multiplies x by it; where the scale is 0, x stays as it is.

    x is `[n]`.  Scales, 0-d or `[n]`, are standard deviations, or the largest absolute values of uniform
    noise.  The seed has 64 bits.
    """
    compute = compute_dtype(x.dtype)
    h, scale = x.to(compute), scale.to(compute)
    z = symmetric(seed, at, x) if kind == "uniform" else normal(seed, at, x, ROUNDS)
    z = z.to(compute)
    noisy = h * (1 + scale * z) if kind == "multiplicative" else h + scale * z
    return torch.where(scale == 0, h, noisy).to(x.dtype)
