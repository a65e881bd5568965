"""Computes activation functions by name, and their backward passes, by exponentials of base 2.

GELU (Hendrycks & Gimpel 2016), exact and by tanh, and SiLU (Ramachandran et al. 2017).
"""

import triton
import triton.language as tl


@triton.jit
def normal_cdf(x):
    """Φ(x), off by 5e-8 in float32, in half the instructions of `tl.erf`.

    log2 of the tail is a polynomial in |x|, fitted to the smallest largest error.  Its last coefficient is
    negative, so that it falls beyond 5.5, too, where the fit ends.
    """
    if x.dtype == tl.float64:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        u = tl.abs(x)
        q = -2.8350571028568083e-06 * u + 3.9379141526296735e-05
        q = q * u - 0.00018618593458086252
        q = q * u - 0.000136925169499591
        q = q * u + 0.0070634083822369576
        q = q * u - 0.05249617248773575
        q = q * u - 0.4592081904411316
        q = q * u - 1.1511051654815674
        tail = tl.exp2(q * u - 1.0)
        return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def sigmoid(t):
    """s = σ(t ln 2) and s (1 - s), by a power of 2 that neither overflows nor cancels."""
    e = tl.exp2(-tl.abs(t))
    r = 1.0 / (1.0 + e)
    other = e * r
    return tl.where(t < 0, other, r), other * r


@triton.jit
def gelu_gate(x):
    """σ(2 √(2/π) (x + 0.044715 x³)): (1 + tanh z) / 2 = σ(2 z)."""
    return sigmoid(x * (2.302208198144325 + 0.10294323958002349 * x * x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        return x * normal_cdf(x)
    elif ACTIVATION == "gelu_tanh":
        s, _ = gelu_gate(x)
        return x * s
    elif ACTIVATION == "silu":
        s, _ = sigmoid(1.4426950408889634 * x)
        return x * s
    else:
        tl.static_assert(ACTIVATION == "identity")
        return x


@triton.jit
def backpropagate(gradient, x, ACTIVATION: tl.constexpr):
    """Returns the gradient by x for the gradient by its activation."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, gradient)
    elif ACTIVATION == "gelu":
        # φ(x) = 2 ** (-x² log2(e) / 2 - log2(2 π) / 2)
        return gradient * (normal_cdf(x) + x * tl.exp2(-0.7213475204444817 * x * x - 1.3257480647361593))
    elif ACTIVATION == "gelu_tanh":
        s, slope = gelu_gate(x)
        return gradient * (s + slope * (1.5957691216057308 + 0.21406444881780073 * x * x) * x)
    else:
        tl.static_assert(ACTIVATION == "silu")
        s, slope = sigmoid(1.4426950408889634 * x)
        return gradient * (s + slope * x)
