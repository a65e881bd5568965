"""Regularizers: maths on the gradient before the update rule, and on the weight after it."""

import torch
from torch import Tensor

from .random import PhiloxPosition, normal
from .rules import Result


def negate(p: Tensor, u: Tensor, at: PhiloxPosition) -> Result:
    """Negates the update, to maximize: u ← -u."""
    return p, -u, ()


def scale(p: Tensor, u: Tensor, at: PhiloxPosition, factor: Tensor) -> Result:
    """Clips by the norm: u ← factor · u, factor = min(max_norm / (‖g‖ + 1e-6), 1)  (Pascanu et al. 2013)."""
    return p, u * factor, ()


def clip_value(p: Tensor, u: Tensor, at: PhiloxPosition, high: Tensor, low: Tensor) -> Result:
    """Computes u ← min(max(u, low), high)  (Mikolov 2012)."""
    return p, torch.maximum(torch.minimum(u, high), low), ()


def gradient_noise(p: Tensor, u: Tensor, at: PhiloxPosition, key: Tensor, std: Tensor) -> Result:
    """Computes u ← u + std · N(0, 1)  (Neelakantan et al. 2015)."""
    return p, u + std * normal(key, at, u), ()


def relative_noise(
    p: Tensor, u: Tensor, at: PhiloxPosition, size: Tensor, key: Tensor, std: Tensor
) -> Result:
    """Computes u ← u + std · size · N(0, 1), where size follows the gradient's norm."""
    return p, u + std * (size * normal(key, at, u)), ()


def private_noise(
    p: Tensor,
    u: Tensor,
    at: PhiloxPosition,
    key: Tensor,
    std: Tensor,
    share: Tensor,
    low: Tensor,
    high: Tensor,
) -> Result:
    """Makes a sum of clipped gradients private: u ← (u + std · N(0, 1)) · share  (Abadi et al. 2016).

    The noise depends on a step count of its own, low + 2¹⁶ · high: neither may exceed 2¹⁶ - 1, which float32
    holds exactly.
    """
    count = (high.long() << 16) | low.long()
    return p, (u + std * normal(key, PhiloxPosition(at.first, at.skip, at.stream, count), u)) * share, ()


def replaced(p: Tensor, u: Tensor, at: PhiloxPosition) -> Result:
    """Computes p ← u, to write the gradient itself."""
    return u, u, ()


def l2_decay(p: Tensor, u: Tensor, at: PhiloxPosition, rate: Tensor) -> Result:
    """Computes u ← u + rate · p before the update rule, the gradient of rate/2 · ‖p‖²."""
    return p, u + rate * p, ()


def l2_sp(p: Tensor, u: Tensor, at: PhiloxPosition, start: Tensor, rate: Tensor) -> Result:
    """Computes u ← u + rate · (p - start), the gradient of rate/2 · ‖p - start‖²  (Li et al. 2018)."""
    return p, u + rate * (p - start), ()


def decoupled_decay(p: Tensor, u: Tensor, at: PhiloxPosition, keep: Tensor) -> Result:
    """Computes p ← keep · p beside the update, with keep = 1 - lr · λ  (Loshchilov & Hutter 2019)."""
    return p * keep, u, ()


def cautious_decay(p: Tensor, u: Tensor, at: PhiloxPosition, keep: Tensor) -> Result:
    """Computes p ← keep · p where the update shrinks p as well, u · p ≥ 0  (Chen et al. 2025)."""
    return torch.where(u * p >= 0, p * keep, p), u, ()


def l1(p: Tensor, u: Tensor, at: PhiloxPosition, rate: Tensor) -> Result:
    """Thresholds softly after the update: p ← sign(p) · max(|p| - rate, 0)  (Daubechies et al. 2004)."""
    shrunk = torch.clamp(p.abs() - rate, min=0.0)
    return torch.where(p < 0, -shrunk, shrunk), u, ()


def approach(average: Tensor, p: Tensor, weight: Tensor, dither: Tensor) -> Tensor:
    """Returns average + weight · (p - average); a weight of 1 copies.

    In float32, steps below half a unit in the last place would all be lost: an average with decay 0.9999
    would stop 6e-4 short.  `dither`, between plus and minus half of 2⁻²³ and another at every update, makes
    up for the rounding over some updates; where average and p are equal nothing moves.
    """
    step = weight * (p - average)
    if p.dtype == torch.float32:
        unit = (average.view(torch.int32) & 0x7F800000).view(torch.float32)
        step = torch.where(p == average, step, step + dither * unit)
    return torch.where(weight < 1, average + step, p)


def average(
    p: Tensor, u: Tensor, at: PhiloxPosition, average: Tensor, weight: Tensor, dither: Tensor
) -> Result:
    """Computes average ← `approach` p  (Polyak & Juditsky 1992)."""
    return p, u, (approach(average, p, weight, dither),)


def averaged(p: Tensor, u: Tensor, at: PhiloxPosition, weight: Tensor, dither: Tensor) -> Result:
    """Computes p ← `approach` u, for averages that are themselves the parameters."""
    return approach(p, u, weight, dither), u, ()


def rounded(p: Tensor, u: Tensor, at: PhiloxPosition, rounded: Tensor) -> Result:
    """Computes rounded ← p, in the dtype of its buffer."""
    return p, u, (p,)


def lookahead(p: Tensor, u: Tensor, at: PhiloxPosition, slow: Tensor, alpha: Tensor, sync: Tensor) -> Result:
    """Computes slow ← slow + alpha · (p - slow), p ← slow  (Zhang et al. 2019); with sync 0, p stays."""
    slow = slow + alpha * (p - slow)
    return torch.where(sync != 0, slow, p), u, (slow,)


def lookahead_pullback(
    p: Tensor, u: Tensor, at: PhiloxPosition, slow: Tensor, slow_momentum: Tensor, alpha: Tensor, sync: Tensor
) -> Result:
    """Synchronises like `lookahead`; the slow momentum is a buffer that `SlowWeights.finish` uses."""
    return lookahead(p, u, at, slow, alpha, sync)
