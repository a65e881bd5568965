"""Noise on activations: added to each element, or multiplied with it.

What is drawn for an element is a function of (seed, its index) alone, so that nothing is stored for the
backward pass: added noise passes gradients on as they are, a factor is drawn again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .random import PhiloxPosition, bits16, normal
from .step import compute_dtype

KINDS = ("additive", "multiplicative", "uniform")
"""x + scale · N(0, 1), x · (1 + scale · N(0, 1)), and x + scale · U(-1, 1)."""

ROUNDS = 7
"""Of Philox, as for masks: see `dropout`."""


def symmetric(seed: Tensor | int, at: PhiloxPosition, like: Tensor) -> Tensor:
    """Uniform in (-1, 1), odd multiples of 2⁻¹⁶, float32, one for every element of the flat tensor `like`."""
    return bits16(seed, at, like, ROUNDS).float() * 2.0**-15 + (2.0**-16 - 1.0)


def noise(x: Tensor, seed: Tensor | int, scale: Tensor, at: PhiloxPosition, kind: str) -> Tensor:
    """x with noise; where the scale is 0, x to the bit.

    Args:
        x: `[n]`.
        seed: 64 bits, as an int64 tensor or an integer.
        scale: 0-d or `[n]`: standard deviations, or of uniform noise its largest absolute value.
        at: Where the elements lie.
        kind: One of `KINDS`.
    """
    compute = compute_dtype(x.dtype)
    h, scale = x.to(compute), scale.to(compute)
    z = symmetric(seed, at, x) if kind == "uniform" else normal(seed, at, x, ROUNDS)
    z = z.to(compute)
    noisy = h * (1 + scale * z) if kind == "multiplicative" else h + scale * z
    return torch.where(scale == 0, h, noisy).to(x.dtype)
