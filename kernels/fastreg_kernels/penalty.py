"""Stages that compute gradients of penalties: p is the output, u the penalized weight.

See `rules` for the form of a stage.
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
