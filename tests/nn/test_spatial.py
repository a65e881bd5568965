"""Dropout of whole channels."""

import warnings

import pytest
import torch
from torch import nn

from fastreg.nn import Dropout1d, Dropout2d, Dropout3d, functional

PAIRS = {1: (Dropout1d, nn.Dropout1d), 2: (Dropout2d, nn.Dropout2d), 3: (Dropout3d, nn.Dropout3d)}
DIMS = pytest.mark.parametrize("dims", PAIRS)
SHAPES = [(64, 9), (16, 20, 3), (16, 20, 3, 2), (16, 20, 3, 2, 2), (16, 20, 2, 1, 2, 2)]


def seeded(function, *args, **options):
    torch.manual_seed(0)
    return function(*args, **options)


def complaints(module, x):
    """The type and words of every warning and error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            y = module(x)
        except (RuntimeError, ValueError) as error:
            return [(type(error), str(error))], None
    return [(w.category, str(w.message)) for w in caught], y


def constant_over(y):
    """The dimensions along which the mask is constant."""
    kept = y != 0
    return [d for d in range(y.dim()) if y.shape[d] > 1 and (kept.narrow(d, 0, 1) == kept).all()]


@DIMS
def test_whole_channels(backend, dims):
    ours, _ = PAIRS[dims]
    x = torch.randn(8, 6, *[3] * dims, requires_grad=True)
    y = seeded(ours(0.5), x)
    assert torch.equal(y, seeded(functional.dropout, x, 0.5, noise_shape=(8, 6, *[1] * dims)))
    kept = (y != 0).flatten(2)
    assert torch.equal(kept.any(2), kept.all(2)) and 10 < int(kept.any(2).sum()) < 38
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(g, 2 * (y != 0))


@DIMS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_takes_what_torch_takes(dims, shape, training):
    """With the same warnings and errors, and the same dimensions in common."""
    ours, theirs = (cls(0.5).train(training) for cls in PAIRS[dims])
    x = torch.ones(shape)
    torch.manual_seed(0)
    (said, y), (expected, z) = complaints(ours, x), complaints(theirs, x)
    assert said == expected and (y is None) == (z is None)
    if y is not None:
        assert y.shape == shape and constant_over(y) == constant_over(z)
        assert (y is x) != training


@DIMS
def test_a_drop_in(dims):
    ours, theirs = PAIRS[dims]
    module = ours(0.25)
    assert isinstance(module, theirs) and not module.state_dict() and module.p == 0.25
    assert repr(module) == repr(theirs(0.25)) and repr(ours(0.1, True)) == repr(theirs(0.1, True))
    x = torch.ones(8, 6, *[3] * dims)
    assert module.eval()(x) is x
    copied = x.clone()
    assert seeded(ours(0.5, True), copied) is copied and torch.equal(copied, seeded(ours(0.5), x))
    module.train().p = 0.0
    assert module(x) is x
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"p must be in \[0, 1\], got p="):
            ours(bad)


@pytest.mark.parametrize("dims, shape", [(1, (4, 2, 3)), (1, (2, 3)), (2, (4, 2, 3, 3)), (3, (2, 3, 3, 3))])
def test_a_rate_for_each_channel(dims, shape):
    y = PAIRS[dims][0]([0.0, 1.0])(torch.ones(shape))
    channels = y.movedim(-dims - 1, 0)
    assert channels[0].all() and not channels[1].any()


@DIMS
def test_annealing_compiles_once(dims):
    graphs = []
    module = PAIRS[dims][0](0.5)
    compiled = torch.compile(module, fullgraph=True, backend=lambda g, _: graphs.append(g) or g)
    x = torch.randn(8, 6, *[3] * dims)
    for p in (0.5, 0.4, 0.0, 1.0):
        module.p = p
        expected = seeded(functional.dropout, x, p, noise_shape=(8, 6, *[1] * dims))
        assert torch.equal(seeded(compiled, x), expected)
    assert len(graphs) == 1
