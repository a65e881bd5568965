"""Stages that perturb weights before a backward pass: sharpness-aware minimization, and noise."""

import torch
from torch import Tensor

from .random import PhiloxPosition, normal
from .rules import Result


def adaptive(p: Tensor, u: Tensor, at: PhiloxPosition, factor: Tensor, offset: Tensor) -> Result:
    """Scales the gradient by T = |p| + η, or by 1 where factor is 0 and offset 1  (Kwon et al. 2021).

    u ← T · u
    """
    return p, (factor * p.abs() + offset) * u, ()


def perturb(
    p: Tensor, u: Tensor, at: PhiloxPosition, backup: Tensor, inverse_norm: Tensor, rho: Tensor
) -> Result:
    """Moves the weight by ρ along the gradient; with an inverse_norm of 0 it stays  (Foret et al. 2021).

    backup ← p, p ← p + ρ · u / ‖u‖
    """
    # Selected, though the norm is never negative: a copy of an input that the same graph overwrites comes out
    # of Inductor (torch 2.13) as what overwrites it.
    perturbed = torch.where(inverse_norm > 0, p + rho * (inverse_norm * u), p)
    return perturbed, u, (torch.where(inverse_norm < 0, u, p),)


def perturb_adaptive(
    p: Tensor, u: Tensor, at: PhiloxPosition, backup: Tensor, inverse_norm: Tensor,
    factor: Tensor, offset: Tensor, rho: Tensor,
) -> Result:  # fmt: skip
    """Moves the weight as ASAM does, where u is T g already  (Kwon et al. 2021).

    backup ← p, p ← p + ρ · T² g / ‖T g‖
    """
    return perturb(p, (factor * p.abs() + offset) * u, at, backup, inverse_norm, rho)


def perturb_momentum(p: Tensor, u: Tensor, at: PhiloxPosition, perturbation: Tensor) -> Result:
    """Moves the weight against the momentum v, which is u; perturbation is ρ / ‖v‖  (Becker et al. 2024).

    p ← p - ρ · v / ‖v‖
    """
    return p - perturbation * u, u, ()


def noise(
    p: Tensor, u: Tensor, at: PhiloxPosition, backup: Tensor, key: Tensor, absolute: Tensor, relative: Tensor
) -> Result:
    """Adds Gaussian noise to the weight, of σ = absolute + relative · |p|.

    backup ← p, p ← p + σ · N(0, 1)
    """
    noisy = p + (relative * p.abs() + absolute) * normal(key, at, p)
    return noisy, u, (torch.where(absolute < 0, noisy, p),)  # selected, as in `perturb`
