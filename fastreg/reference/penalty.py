"""Computes penalties, and their gradients as stages: p is the output, u the penalized weight."""

from torch import Tensor

from .random import PhiloxPosition
from .rules import Result


def penalty(tensor: Tensor, absolute: bool) -> Tensor:
    """Returns Σ p², or Σ |p| if `absolute`."""
    return (tensor.abs() if absolute else tensor.square()).sum()


def l2_gradient(p: Tensor, u: Tensor, at: PhiloxPosition, scale: Tensor) -> Result:
    """Returns scale · u, where scale is twice the gradient of the penalty's value."""
    return scale * u, u, ()


def l1_gradient(p: Tensor, u: Tensor, at: PhiloxPosition, scale: Tensor) -> Result:
    """Returns scale · sign(u), 0 at 0 as in torch."""
    return scale * u.sign(), u, ()
