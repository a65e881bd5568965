"""Penalties, and their gradients as stages: p is where the gradient goes, u the weight that is penalised."""

from __future__ import annotations

from torch import Tensor

from .random import PhiloxPosition
from .rules import Result


def penalty(tensor: Tensor, absolute: bool) -> Tensor:
    """Σ p², or Σ |p|."""
    return (tensor.abs() if absolute else tensor.square()).sum()


def l2_gradient(p: Tensor, u: Tensor, at: PhiloxPosition, scale: Tensor) -> Result:
    """scale · u, where scale is twice what comes from above."""
    return scale * u, u, ()


def l1_gradient(p: Tensor, u: Tensor, at: PhiloxPosition, scale: Tensor) -> Result:
    """scale · sign(u), 0 at 0 as torch has it."""
    return scale * u.sign(), u, ()
