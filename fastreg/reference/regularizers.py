"""Regularizers: what is done to the gradient before the update rule and to the weight after it."""

from __future__ import annotations

from torch import Tensor

from .random import At, normal
from .rules import Result


def clip(p: Tensor, u: Tensor, at: At, factor: Tensor) -> Result:
    """u ← factor · u, with factor = min(max_norm / (‖g‖ + 1e-6), 1)  (Pascanu et al. 2013)."""
    return p, u * factor, ()


def gradient_noise(p: Tensor, u: Tensor, at: At, key: Tensor, std: Tensor) -> Result:
    """u ← u + std · N(0, 1)  (Neelakantan et al. 2015)."""
    return p, u + std * normal(key, at, u), ()


def l2_decay(p: Tensor, u: Tensor, at: At, rate: Tensor) -> Result:
    """u ← u + rate · p before the update rule, the gradient of rate/2 · ‖p‖²."""
    return p, u + rate * p, ()


def decoupled_decay(p: Tensor, u: Tensor, at: At, keep: Tensor) -> Result:
    """p ← keep · p beside the update, with keep = 1 - lr · λ  (Loshchilov & Hutter 2019)."""
    return p * keep, u, ()


def ema(p: Tensor, u: Tensor, at: At, average: Tensor, weight: Tensor) -> Result:
    """average ← average + weight · (p - average)  (Polyak & Juditsky 1992)."""
    return p, u, (average + weight * (p - average),)
