"""Gradients of penalties: what takes the place of the weight, which is nobody's but a gradient's to be.

The form of a stage is told in `rules`; u is the weight that is penalised.
"""

import triton
import triton.language as tl


@triton.jit
def l2_gradient(p, u, at, scale):
    return scale * u, u, ()


@triton.jit
def l1_gradient(p, u, at, scale):
    sign = tl.where(u > 0, 1.0, 0.0) - tl.where(u < 0, 1.0, 0.0)
    return scale * sign, u, ()
