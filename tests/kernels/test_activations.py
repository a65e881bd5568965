"""Activation functions and their derivatives, as the kernel of dropout applies them."""

import pytest
import torch

import fastreg
from fastreg.nn import rates
from fastreg.ops import dropout as dropout_ops
from fastreg.reference.activations import ACTIVATIONS

ORACLES = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def test_every_activation_has_an_oracle():
    assert ORACLES.keys() == ACTIVATIONS.keys() - {"identity"}


@pytest.mark.parametrize("activation", ORACLES)
@pytest.mark.parametrize(
    "backend, dtype", [("triton", torch.float32), ("triton", torch.float64), ("reference", torch.float64)]
)
def test_functions_and_derivatives(activation, backend, dtype):
    """Against autograd of torch's own function in float64, over all that matters."""
    ends = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 1e4, -1e4])
    x = torch.cat((torch.linspace(-14, 14, 5001), ends)).to(dtype)
    exact = x.double().requires_grad_()
    truth = ORACLES[activation](exact)
    (slope,) = torch.autograd.grad(truth.sum(), exact)
    none = rates.drop_thresholds(0.0)
    seed = torch.tensor(0)
    with fastreg.use_backend(backend):
        y = dropout_ops.bias_act_dropout_add(x, None, None, seed, none, 1, activation)
        d = dropout_ops.bias_act_dropout_backward(x, None, torch.ones_like(x), seed, none, 1, activation)
    unit = torch.finfo(dtype).eps * (1 if dtype == torch.float32 else 4)  # in float64 the oracle rounds too
    # Tails are a difference from 1, with its rounding, times x.
    assert ((y - truth).abs() <= 2 * unit * exact.abs().clamp(min=1)).all()
    assert ((d - slope).abs() <= 8 * unit).all()


def test_relu_passes_gradients_as_torch_does(backend):
    """None where x is not positive, however large; all where x is NaN."""
    x = torch.tensor([-1.0, 0.0, 1.0, float("nan"), float("-inf"), 2.0])
    gradient = torch.tensor([float("inf"), float("nan"), 3.0, 4.0, float("-inf"), float("inf")])
    exact = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(torch.relu(exact), exact, gradient)
    none, seed = rates.drop_thresholds(0.0), torch.tensor(0)
    actual = dropout_ops.bias_act_dropout_backward(x, None, gradient, seed, none, 1, "relu")
    assert torch.equal(actual, expected)
