"""Defines activation functions by name, with their backward passes, in the precision of the argument."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Activation(NamedTuple):
    """A function of each element, and its backward pass: a function of a gradient and of the argument."""

    function: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _identity(x: Tensor) -> Tensor:
    return x


def _gelu_derivative(x: Tensor) -> Tensor:
    """Φ(x) + x φ(x) of the normal distribution."""
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh(x: Tensor) -> Tensor:
    """x σ(2 √(2/π) (x + 0.044715 x³)): (1 + tanh z) / 2 = σ(2 z)."""
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    z = math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x)
    s = torch.sigmoid(z)
    return s + x * s * torch.sigmoid(-z) * (math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * x * x))


def _silu_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s + x * s * torch.sigmoid(-x)


ACTIVATIONS = {
    "identity": Activation(_identity, lambda gradient, x: gradient),
    "relu": Activation(functional.relu, lambda gradient, x: torch.where(x <= 0, 0, gradient)),
    "gelu": Activation(functional.gelu, lambda gradient, x: gradient * _gelu_derivative(x)),
    "gelu_tanh": Activation(_gelu_tanh, lambda gradient, x: gradient * _gelu_tanh_derivative(x)),
    "silu": Activation(functional.silu, lambda gradient, x: gradient * _silu_derivative(x)),
}
"""ReLU; GELU (Hendrycks & Gimpel 2016), exact and by tanh; SiLU, or Swish (Ramachandran et al. 2017)."""
