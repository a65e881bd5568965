"""Base optimizers, problems and steps of the tests of SAM."""

import torch
from torch.nn import Parameter

import fastreg

from .conftest import set_gradients

BASES = {
    "fastreg": (fastreg.AdamW, {"lr": 0.1}),
    "fastreg momentum": (fastreg.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "torch": (torch.optim.AdamW, {"lr": 0.1}),
    "torch momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
}
PARTS = (slice(0, 4), slice(4, 8))
"""Micro-batches of `problem`."""
CURVATURE = torch.tensor([4.0, 1.0], dtype=torch.float64)


def quadratic(w, curvature=CURVATURE):
    """Returns the loss ½ Σ λ w²."""
    return 0.5 * (curvature * w * w).sum()


def problem(dtype=torch.float64):
    """Returns weights, and the loss of a batch or a part of it."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((8, 5), (8, 3)))
    params = [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((5, 3), (3,))]

    def loss(part=slice(None)):
        matrix, bias = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in params)
        return ((x[part].to(matrix.dtype) @ matrix + bias).tanh() - y[part].to(matrix.dtype)).square().mean()

    return params, loss


def cycle(optimizer, loss):
    """Takes both passes and the step, by a function that returns the loss."""
    optimizer.zero_grad()
    loss().backward()
    optimizer.first_step(zero_grad=True)
    loss().backward()
    optimizer.second_step(zero_grad=True)


def fixed_cycle(optimizer, params, seed, *without):
    """Takes both passes with gradients that do not depend on the weights; the step is by those of `seed`."""
    set_gradients(params, 1000 + seed)
    optimizer.first_step()
    set_gradients(params, seed, *without)
    optimizer.second_step()


def same_state(a, b):
    """Returns whether two optimizers have the same state, step counts apart."""
    states = a.state_dict()["state"], b.state_dict()["state"]
    ignored = ("step", "sam_count")
    names = [
        {i: {n for n in s[i] if n not in ignored} for i in s if s[i].keys() - set(ignored)} for s in states
    ]
    return names[0] == names[1] and all(
        torch.equal(states[0][i][n], states[1][i][n]) for i in names[0] for n in names[0][i]
    )
