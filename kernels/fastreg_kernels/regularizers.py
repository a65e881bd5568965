"""Regularizers: what is done to the gradient before the update rule and to the weight after it.

See `rules` for the arguments of a stage.
"""

import triton
import triton.language as tl

from .random import PhiloxPosition, normal


@triton.jit
def negate(p, u, at):
    return p, -u, ()


@triton.jit
def scale(p, u, at, factor):
    return p, u * factor, ()


@triton.jit
def clip_value(p, u, at, high, low):
    u = tl.minimum(u, high, propagate_nan=tl.PropagateNan.ALL)
    return p, tl.maximum(u, low, propagate_nan=tl.PropagateNan.ALL), ()


@triton.jit
def gradient_noise(p, u, at, key, std):
    return p, u + std * normal(key, at, u), ()


@triton.jit
def relative_noise(p, u, at, size, key, std):
    return p, u + std * (size * normal(key, at, u)), ()


@triton.jit
def private_noise(p, u, at, key, std, share, low, high):
    count = (high.to(tl.uint32) << 16) | low.to(tl.uint32)
    z = normal(key, PhiloxPosition(at.first, at.stream, count, at.vector), u)
    return p, (u + std * z) * share, ()


@triton.jit
def replaced(p, u, at):
    return u, u, ()


@triton.jit
def l2_decay(p, u, at, rate):
    return p, u + rate * p, ()


@triton.jit
def l2_sp(p, u, at, start, rate):
    return p, u + rate * (p - start), ()


@triton.jit
def decoupled_decay(p, u, at, keep):
    return p * keep, u, ()


@triton.jit
def cautious_decay(p, u, at, keep):
    return tl.where(u * p >= 0, p * keep, p), u, ()


@triton.jit
def l1(p, u, at, rate):
    shrunk = tl.maximum(tl.abs(p) - rate, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(p < 0, -shrunk, shrunk), u, ()


@triton.jit
def approach(average, p, weight, dither):
    step = weight * (p - average)
    if p.dtype == tl.float32:
        unit = (average.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        step = tl.where(p == average, step, step + dither * unit)
    return tl.where(weight < 1, average + step, p)


@triton.jit
def average(p, u, at, average, weight, dither):
    return p, u, (approach(average, p, weight, dither),)


@triton.jit
def averaged(p, u, at, weight, dither):
    return approach(p, u, weight, dither), u, ()


@triton.jit
def rounded(p, u, at, rounded):
    return p, u, (p,)


@triton.jit
def lookahead(p, u, at, slow, alpha, sync):
    slow += alpha * (p - slow)
    return tl.where(sync != 0, slow, p), u, (slow,)


@triton.jit
def lookahead_pullback(p, u, at, slow, slow_momentum, alpha, sync):
    return lookahead(p, u, at, slow, alpha, sync)
