"""Update rules: `u` is the gradient on entry and the step to subtract on return."""

import torch
from torch import Tensor

from .random import PhiloxPosition, sqrt

Result = tuple[Tensor, Tensor, tuple[Tensor, ...]]


def adam(
    p: Tensor, u: Tensor, at: PhiloxPosition, exp_avg: Tensor, exp_avg_sq: Tensor,
    one_minus_beta1: Tensor, beta2: Tensor, one_minus_beta2: Tensor,
    step_size: Tensor, scale: Tensor, eps: Tensor,
) -> Result:  # fmt: skip
    """Computes Adam's step; lr/(1-β₁ᵗ) is step_size and 1/√(1-β₂ᵗ) scale  (Kingma & Ba 2015).

    m ← m + (1-β₁)(u - m),  v ← β₂v + (1-β₂)u²,  u ← lr/(1-β₁ᵗ) · m / (√v/√(1-β₂ᵗ) + ε)
    """
    exp_avg = exp_avg + one_minus_beta1 * (u - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (u * u)
    return p, step_size * (exp_avg / (scale * sqrt(exp_avg_sq) + eps)), (exp_avg, exp_avg_sq)


def adam_amsgrad(
    p: Tensor, u: Tensor, at: PhiloxPosition, exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Tensor,
    one_minus_beta1: Tensor, beta2: Tensor, one_minus_beta2: Tensor,
    step_size: Tensor, scale: Tensor, eps: Tensor,
) -> Result:  # fmt: skip
    """Computes the step of `adam` with the largest v so far instead of v  (Reddi et al. 2018)."""
    exp_avg = exp_avg + one_minus_beta1 * (u - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (u * u)
    max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)
    u = step_size * (exp_avg / (scale * sqrt(max_exp_avg_sq) + eps))
    return p, u, (exp_avg, exp_avg_sq, max_exp_avg_sq)


def sgd(p: Tensor, u: Tensor, at: PhiloxPosition, lr: Tensor) -> Result:
    """Scales the gradient by the learning rate: u ← lr · u."""
    return p, lr * u, ()


def sgd_momentum(
    p: Tensor, u: Tensor, at: PhiloxPosition, momentum_buffer: Tensor,
    momentum: Tensor, one_minus_beta: Tensor, lr: Tensor,
) -> Result:  # fmt: skip
    """Computes the step of SGD with momentum: b ← μb + (1-τ)u, u ← lr · b  (Polyak 1964)."""
    momentum_buffer = momentum * momentum_buffer + one_minus_beta * u
    return p, lr * momentum_buffer, (momentum_buffer,)


def sgd_nesterov(
    p: Tensor, u: Tensor, at: PhiloxPosition, momentum_buffer: Tensor,
    momentum: Tensor, one_minus_beta: Tensor, lr: Tensor, lr_momentum: Tensor,
) -> Result:  # fmt: skip
    """Computes the step of SGD with Nesterov's momentum  (Sutskever et al. 2013).

    b ← μb + (1-τ)u,  u ← lr · u + lr · μ · b
    """
    momentum_buffer = momentum * momentum_buffer + one_minus_beta * u
    return p, lr * u + lr_momentum * momentum_buffer, (momentum_buffer,)


def lion(
    p: Tensor, u: Tensor, at: PhiloxPosition, exp_avg: Tensor,
    beta1: Tensor, one_minus_beta1: Tensor, beta2: Tensor, one_minus_beta2: Tensor, lr: Tensor,
) -> Result:  # fmt: skip
    """Computes Lion's step from the gradient u  (Chen et al. 2023).

    u ← lr · sign(β₁m + (1-β₁)u),  m ← β₂m + (1-β₂)u
    """
    return p, lr * (beta1 * exp_avg + one_minus_beta1 * u).sign(), (beta2 * exp_avg + one_minus_beta2 * u,)


def descend(p: Tensor, u: Tensor, at: PhiloxPosition) -> Result:
    """Subtracts the update from the weight: p ← p - u."""
    return p - u, u, ()


def descend_with_momentum(p: Tensor, u: tuple[Tensor, Tensor], at: PhiloxPosition) -> Result:
    """Subtracts the update from the weight, where u is (update, momentum), and hands on the momentum."""
    return p - u[0], u[1], ()
