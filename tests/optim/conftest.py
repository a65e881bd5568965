"""Helpers of the tests of optimizers: parameters, their gradients, and comparisons."""

import io

import torch
from torch.nn import Parameter

SHAPES = [(33,), (4, 5), ()]
KINDS = {
    "float32": (torch.float32, {}),
    "stochastic": (torch.bfloat16, {"bf16": "stochastic"}),
    "remainder": (torch.bfloat16, {"bf16": "remainder"}),
}
"""Dtypes of weights, and how an optimizer rounds them."""


def double(*values):
    """Returns a parameter of these values in float64."""
    return Parameter(torch.tensor(values, dtype=torch.float64))


def weights(dtype=torch.float32, shapes=SHAPES):
    """Returns parameters that are the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return [
        Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
    ]


def set_gradients(params, seed, *without):
    """Sets gradients that depend on the seed alone; the parameters at some indices get none."""
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.grad = None if i in without else gradient


def values(params):
    """Returns copies of parameters."""
    return [p.detach().clone() for p in params]


def equal(a, b):
    """Returns whether two lists of tensors have the same bits."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


def through_file(*objects):
    """Returns what is loaded, as safely as torch loads, after saving objects."""
    file = io.BytesIO()
    torch.save(objects, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
