"""What is done to the weight before a backward pass: sharpness-aware minimization, and noise."""

from __future__ import annotations

import torch
from torch import Tensor

from .random import PhiloxPosition, normal
from .rules import Result


def adaptive(p: Tensor, u: Tensor, at: PhiloxPosition, factor: Tensor, offset: Tensor) -> Result:
    """u ← T · u with T = |p| + η, or 1 where factor is 0 and offset 1  (Kwon et al. 2021)."""
    return p, (factor * p.abs() + offset) * u, ()


def perturb(p: Tensor, u: Tensor, at: PhiloxPosition, backup: Tensor, size: Tensor, rho: Tensor) -> Result:
    """backup ← p, p ← p + ρ · u / ‖u‖ with size = 1 / ‖u‖  (Foret et al. 2021); size 0: p stays."""
    # Selected, though size is never negative: a copy of an input that the same graph overwrites comes out of
    # Inductor (torch 2.13) as what overwrites it.
    return torch.where(size > 0, p + rho * (size * u), p), u, (torch.where(size < 0, u, p),)


def perturb_adaptive(
    p: Tensor,
    u: Tensor,
    at: PhiloxPosition,
    backup: Tensor,
    size: Tensor,
    factor: Tensor,
    offset: Tensor,
    rho: Tensor,
) -> Result:
    """backup ← p, p ← p + ρ · T² g / ‖T g‖, where u is T g already  (Kwon et al. 2021)."""
    return perturb(p, (factor * p.abs() + offset) * u, at, backup, size, rho)


def perturb_momentum(p: Tensor, u: Tensor, at: PhiloxPosition, size: Tensor) -> Result:
    """p ← p - ρ · v / ‖v‖ with the momentum v as u and size = ρ / ‖v‖  (Becker et al. 2024)."""
    return p - size * u, u, ()


def noise(
    p: Tensor, u: Tensor, at: PhiloxPosition, backup: Tensor, key: Tensor, absolute: Tensor, relative: Tensor
) -> Result:
    """backup ← p, p ← p + σ · N(0, 1) with σ = absolute + relative · |p|."""
    noisy = p + (relative * p.abs() + absolute) * normal(key, at, p)
    return noisy, u, (torch.where(absolute < 0, noisy, p),)  # selected, as in `perturb`
