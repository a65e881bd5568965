"""Regularizers: what is done to the gradient before the update rule and to the weight after it."""

from __future__ import annotations

from torch import Tensor

from .random import At, normal
from .rules import Result


def clip(p: Tensor, u: Tensor, at: At, factor: Tensor) -> Result:
    """U ← factor · u, with factor = min(max_norm / (‖g‖ + 1e-6), 1)  (Pascanu et al. 2013)."""
    return p, u * factor, ()


def gradient_noise(p: Tensor, u: Tensor, at: At, key: Tensor, std: Tensor) -> Result:
    """U ← u + std · N(0, 1)  (Neelakantan et al. 2015)."""
    return p, u + std * normal(key, at, u), ()


def l2_decay(p: Tensor, u: Tensor, at: At, rate: Tensor) -> Result:
    """U ← u + rate · p before the update rule, the gradient of rate/2 · ‖p‖²."""
    return p, u + rate * p, ()


def decoupled_decay(p: Tensor, u: Tensor, at: At, rate: Tensor) -> Result:
    """U ← u + rate · p after the update rule  (Loshchilov & Hutter 2019)."""
    return p, u + rate * p, ()


def ema(p: Tensor, u: Tensor, at: At, average: Tensor, weight: Tensor) -> Result:
    """Average ← average + weight · (p - average)  (Polyak & Juditsky 1992)."""
    return p, u, (average + weight * (p - average),)
