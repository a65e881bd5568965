"""Regularizers: what is done to the gradient before the update rule and to the weight after it.

The form of a stage is told in `rules`.
"""

import triton
import triton.language as tl  # noqa: F401  (the interpreter looks for it in every module)

from .random import normal


@triton.jit
def clip(p, u, at, factor):
    return p, u * factor, ()


@triton.jit
def gradient_noise(p, u, at, key, std):
    return p, u + std * normal(key, at, u), ()


@triton.jit
def l2_decay(p, u, at, rate):
    return p, u + rate * p, ()


@triton.jit
def decoupled_decay(p, u, at, keep):
    return p * keep, u, ()


@triton.jit
def ema(p, u, at, average, weight):
    return p, u, (average + weight * (p - average),)
