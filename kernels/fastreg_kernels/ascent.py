"""Sharpness-aware minimization: what is done to the weight before the second backward pass.

The form of a stage is told in `rules`.
"""

import triton
import triton.language as tl


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
