"""Stages that perturb weights before a backward pass: sharpness-aware minimization, and noise.

`rules` describes the form of a stage.
"""

import triton
import triton.language as tl

from .random import normal


@triton.jit
def adaptive(p, u, at, factor, offset):
    return p, (factor * tl.abs(p) + offset) * u, ()


@triton.jit
def perturb(p, u, at, backup, inverse_norm, rho):
    return tl.where(inverse_norm > 0, p + rho * (inverse_norm * u), p), u, (p,)


@triton.jit
def perturb_adaptive(p, u, at, backup, inverse_norm, factor, offset, rho):
    return perturb(p, (factor * tl.abs(p) + offset) * u, at, backup, inverse_norm, rho)


@triton.jit
def perturb_momentum(p, u, at, perturbation):
    return p - perturbation * u, u, ()


@triton.jit
def noise(p, u, at, backup, key, absolute, relative):
    return p + (relative * tl.abs(p) + absolute) * normal(key, at, p), u, (p,)
