"""Stochastic depth."""

import math

import pytest
import torch

from fastreg.nn import DropPath, drop_add_residual, functional
from fastreg.nn.functional import drop_path


def seeded(function, *args, **options):
    torch.manual_seed(0)
    return function(*args, **options)


def test_drop_path_is_dropout_with_one_value_a_sample(backend):
    x = torch.randn(64, 3, 5, requires_grad=True)
    y = seeded(drop_path, x, 0.4)
    assert torch.equal(y, seeded(functional.dropout, x, 0.4, noise_shape=(64, 1, 1)))
    kept = (y != 0).flatten(1)
    assert torch.equal(kept.all(1), kept.any(1)) and 20 < int(kept.all(1).sum()) < 55
    unscaled = seeded(drop_path, x, 0.4, scale_by_keep=False)
    assert torch.equal(unscaled, torch.where(y != 0, x, 0))


def test_module():
    module = DropPath(0.25)
    x = torch.randn(16, 3)
    assert module.drop_prob == 0.25 and not module.state_dict() and "drop_prob=0.25" in repr(module)
    assert torch.equal(seeded(module, x), seeded(drop_path, x, 0.25))
    assert module.eval()(x) is x
    module.train().drop_prob = 0.0
    assert module(x) is x
    for bad in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"drop_prob must be in \[0, 1\]"):
            module.drop_prob = bad
    with pytest.raises(TypeError, match="scale_by_keep must be True or False, got scale_by_keep=3"):
        DropPath(0.1, 3)


def test_annealing_compiles_once():
    graphs = []
    module = DropPath(0.5)
    compiled = torch.compile(module, fullgraph=True, backend=lambda g, _: graphs.append(g) or g)
    x = torch.randn(16, 3)
    for p in (0.5, 0.4, 0.0, 1.0):
        module.drop_prob = p
        assert torch.equal(seeded(compiled, x), seeded(functional.dropout, x, p, noise_shape=(16, 1)))
    assert len(graphs) == 1


def test_a_subset_goes_through_the_branch():
    seen = []

    def branch(x):
        seen.append(x)
        return 2 * x

    x = torch.randn(10, 4, requires_grad=True)
    assert torch.equal(drop_add_residual(x, branch, 0.0), 3 * x)
    assert torch.equal(drop_add_residual(x, branch, 0.7, training=False), 3 * x)
    y = seeded(drop_add_residual, x, branch, 0.7)
    rows = [(x == row).all(1).nonzero().item() for row in seen[-1]]
    assert len(rows) == len(set(rows)) == 3
    scale = torch.ones(10, 1)
    scale[rows] += 2 * 10 / 3
    torch.testing.assert_close(y, x * scale)
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(g, scale.expand_as(x))
    assert len(seeded(drop_add_residual, x, branch, 1.0)) == 10 and len(seen[-1]) == 1
    assert drop_add_residual(x[:0], branch, 0.5).shape == (0, 4)
    with pytest.raises(ValueError, match="drop_prob"):
        drop_add_residual(x, branch, -1)


def test_the_subset_keeps_the_mean():
    x = torch.zeros(8, 1)
    torch.manual_seed(1)
    mean = torch.stack([drop_add_residual(x, torch.ones_like, 0.6) for _ in range(400)]).mean()
    assert abs(mean - 1) < 1e-6  # 3 of 8, always
