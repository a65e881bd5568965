"""What is done to the weight before a backward pass: sharpness-aware minimization, and noise.

The form of a stage is told in `rules`.
"""

import triton
import triton.language as tl

from .random import normal


@triton.jit
def adaptive(p, u, at, factor, offset):
    return p, (factor * tl.abs(p) + offset) * u, ()


@triton.jit
def perturb(p, u, at, backup, size, rho):
    return tl.where(size > 0, p + rho * (size * u), p), u, (p,)


@triton.jit
def perturb_adaptive(p, u, at, backup, size, factor, offset, rho):
    return perturb(p, (factor * tl.abs(p) + offset) * u, at, backup, size, rho)


@triton.jit
def perturb_momentum(p, u, at, size):
    return p - size * u, u, ()


@triton.jit
def noise(p, u, at, backup, key, absolute, relative):
    return p + (relative * tl.abs(p) + absolute) * normal(key, at, p), u, (p,)
