"""Dropout as a function and as a module: what it computes, what it keeps, what it refuses."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import fastreg
from fastreg.nn import Dropout, functional, rates

BACKENDS = ["reference", "compiled", "triton"]


def drop(x, seed, p, **options):
    """With the seed pinned."""
    torch.manual_seed(seed)
    return functional.dropout(x, p, **options)


# Identities ----------------------------------------------------------------------------------------------


def test_rates_of_0_and_1(backend, x):
    with torch.no_grad():
        x[0, 0], x[1, 1] = math.inf, math.nan
    assert torch.equal(drop(x, 0, 0.0).view(torch.int32), x.view(torch.int32))
    assert torch.equal(drop(x, 0, 1.0), torch.zeros_like(x))


def test_only_0_and_1_are_realised_as_such():
    assert [rates.drop_threshold(p) for p in (0, 1e-9, 0.5, 1 - 1e-9, 1)] == [0, 1, 32768, 65535, 65536]
    assert rates.drop_thresholds([0.0, 1e-9, 0.5, 1 - 1e-9, 1.0]).tolist() == [0, 1, 32768, 65535, 65536]


@pytest.mark.slow(backend="compiled", dtype=(torch.float64, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_stays_is_scaled_by_the_rate_realised(backend, dtype, x):
    x, p = x.to(dtype), 0.3
    y = drop(x, 1, p)
    wide = torch.promote_types(dtype, torch.float32)
    scaled = x.to(wide) * (65536 / torch.tensor(65536 - round(p * 65536), dtype=wide))
    stays = y != 0
    assert y.dtype == dtype and 0 < int((~stays).sum()) < x.numel() and not y[~stays].any()
    if backend == "triton" and dtype == torch.bfloat16:  # the interpreter truncates
        assert ((y.float() - scaled).abs() <= scaled.abs() * 2**-7)[stays].all()
    else:
        assert torch.equal(y[stays], scaled.to(dtype)[stays])


def test_what_is_dropped_is_0_whatever_it_was(backend):
    for bad in (math.inf, -math.inf, math.nan):
        x = torch.full((999,), bad, requires_grad=True)
        y = drop(x, 2, 0.5)
        y.backward(torch.full_like(y, bad))
        for values in (y.detach(), x.grad):
            dropped = values == 0
            assert 400 < int(dropped.sum()) < 600 and not values[~dropped].isfinite().any()


def test_backward_is_forward(backend, x):
    x.requires_grad_()
    y = drop(x, 3, 0.4)
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(g, drop(torch.ones_like(x), 3, 0.4))
    a, b = torch.randn_like(x), torch.randn_like(x)
    (adjoint,) = torch.autograd.grad(drop(x, 3, 0.4), x, a)
    assert torch.equal(adjoint, drop(a, 3, 0.4))
    forwards, backwards = (a.double() * drop(b, 3, 0.4)).sum(), (adjoint.double() * b).sum()
    assert abs(forwards - backwards) < 1e-5


def test_in_place_equals_out_of_place(backend, x):
    expected = drop(x, 4, 0.4)
    copied = x.clone()
    assert drop(copied, 4, 0.4, inplace=True) is copied and torch.equal(copied, expected)
    leaf = x.clone().requires_grad_()
    doubled = leaf * 2
    drop(doubled, 4, 0.4, inplace=True).sum().backward()
    assert torch.equal(leaf.grad, 2 * drop(torch.ones_like(x), 4, 0.4))
    view = x.clone().t()
    drop(view, 4, 0.4, inplace=True)
    assert torch.equal(view, drop(x.t(), 4, 0.4))
    with pytest.raises(RuntimeError, match="leaf"):
        drop(leaf, 4, 0.4, inplace=True)


def test_a_rate_for_each_channel(backend):
    x = torch.randn(6, 8, 5)
    for dim in (0, 1, -1, -3):
        n = x.shape[dim]
        assert torch.equal(drop(x, 5, [0.3] * n, dim=dim), drop(x, 5, 0.3))
        rates_of_channels = torch.linspace(0, 1, n)
        y = drop(x, 5, rates_of_channels, dim=dim)
        for channel, p in enumerate(rates_of_channels.tolist()):
            assert torch.equal(y.select(dim, channel), drop(x, 5, p).select(dim, channel))
    with pytest.raises(ValueError, match="p has 4 rates, but dimension 1 of shape .* has 8 channels"):
        functional.dropout(x, [0.1] * 4, dim=1)
    with pytest.raises(IndexError, match=r"dim must be in \[-3, 2\], got 3"):
        functional.dropout(x, [0.1] * 5, dim=3)


def test_many_channels_span_blocks():
    rates_of_elements = torch.rand(5000, generator=torch.Generator().manual_seed(1))
    x = torch.ones(3, 5000)
    results = []
    for backend in BACKENDS:
        with fastreg.use_backend(backend):
            results.append(drop(x, 6, rates_of_elements))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", [(6, 1, 5), (1, 8, 1), (6, 1, 1), (1, 1, 1), (6, 8, 5)])
def test_a_mask_that_is_broadcast(backend, shape):
    x = torch.randn(6, 8, 5, requires_grad=True)
    y, kept = drop(x, 7, 0.5, noise_shape=shape, return_mask=True)
    factors = drop(torch.ones(shape), 7, 0.5)
    assert kept.shape == shape and torch.equal(kept, factors != 0)
    assert torch.equal(y, x * factors)
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(g, factors.expand_as(x))


def test_the_mask_is_returned(backend, x):
    y, kept = drop(x, 8, 0.4, return_mask=True)
    assert kept.dtype == torch.bool and torch.equal(kept, y != 0)
    y, kept = functional.dropout(x, 0.4, training=False, return_mask=True)
    assert y is x and kept.all() and kept.shape == x.shape


# The module ----------------------------------------------------------------------------------------------


def test_it_is_a_dropout(x):
    module = Dropout(0.25)
    assert isinstance(module, nn.Dropout) and module.p == 0.25 and not module.inplace
    assert repr(module) == repr(nn.Dropout(0.25)) and repr(Dropout(0.1, True)) == repr(nn.Dropout(0.1, True))
    assert not module.state_dict() and not list(module.parameters())
    torch.manual_seed(0)
    assert torch.equal(module(x), drop(x, 0, 0.25))
    assert module.eval()(x) is x
    assert Dropout(0)(x) is x
    module.load_state_dict(nn.Dropout(0.5).state_dict())


def test_the_rate_is_what_was_set(x):
    module = Dropout(0.1)
    module.p = 0.9
    torch.manual_seed(0)
    assert module.p == 0.9 and torch.equal(module(x), drop(x, 0, 0.9))
    module.p = [0.1] * 11
    torch.manual_seed(0)
    assert torch.equal(module(x), drop(x, 0, 0.1))
    for bad in (-0.1, 1.1, math.nan, [0.5, 2.0]):
        with pytest.raises(ValueError, match=r"p must be .*\[0, 1\]"):
            module.p = bad
        with pytest.raises(ValueError, match=r"p must be .*\[0, 1\]"):
            Dropout(bad)
    assert module.p == [0.1] * 11


def test_rates_in_a_tensor(x):
    rates_of_channels = torch.linspace(0, 1, 11)
    module = Dropout(rates_of_channels)
    torch.manual_seed(0)
    assert torch.equal(module(x), drop(x, 0, rates_of_channels))
    compiled = torch.compile(lambda x, p: functional.dropout(x, p), fullgraph=True, backend="eager")
    torch.manual_seed(0)
    assert torch.equal(compiled(x, rates_of_channels), drop(x, 0, rates_of_channels))


def test_no_conversion_changes_the_rate(x):
    module = Dropout(0.1)
    for changed in (module.bfloat16(), module.half(), module.double(), copy.deepcopy(module)):
        thresholds = changed.drop_thresholds
        assert int(thresholds) == round(0.1 * 65536) and thresholds.dtype == torch.int32
    with torch.device("meta"):
        module = Dropout(0.1)
    module.to_empty(device="cpu")
    assert int(module.drop_thresholds) == round(0.1 * 65536)
    again = pickle.loads(pickle.dumps(module))
    torch.manual_seed(0)
    assert again.p == 0.1 and torch.equal(again(x), drop(x, 0, 0.1))
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=False).p == 0.1


def test_autocast(x):
    with torch.autocast("cpu", torch.bfloat16):
        y = Dropout(0.5)(x @ x.t())
    assert y.dtype == torch.bfloat16


def test_sizes_of_noise_may_be_left_open():
    module = Dropout(0.5, noise_shape=(None, 1, None))
    y = module(torch.ones(4, 6, 5))
    assert torch.equal(y, y[:, :1].expand_as(y)) and 0 < int((y == 0).sum()) < y.numel()
    with pytest.raises(ValueError, match="does not fit an input of shape"):
        module(torch.ones(4))


def test_refusals(x):
    with pytest.raises(TypeError, match="floating dtype, got torch.int64"):
        functional.dropout(torch.ones(3, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"noise_shape must have the input's sizes \(37, 11\) or 1, got \(2, 11\)"
    ):
        functional.dropout(x, 0.5, noise_shape=(2, 11))
    with pytest.raises(ValueError, match="p must be a rate or one for each channel"):
        functional.dropout(x, torch.rand(2, 2))
    for bad in ("0.1", None):
        with pytest.raises(TypeError, match="p must be a rate in .*, or a list or tensor of rates, got"):
            Dropout(bad)
    with pytest.raises(TypeError, match="p must be a number, got p=True"):
        Dropout(True)
    with pytest.raises(TypeError, match="inplace must be True or False, got inplace=3"):
        Dropout(inplace=3)
    assert Dropout(np.float32(0.5)).p == 0.5


def test_a_module_that_is_called_twice_keeps_both_masks(x):
    module = Dropout(0.5)
    leaf = x.requires_grad_()
    a, b = module(leaf), module(leaf)
    (of_a,) = torch.autograd.grad(a, leaf, torch.ones_like(a))
    (of_b,) = torch.autograd.grad(b, leaf, torch.ones_like(b))
    assert torch.equal(of_a != 0, a != 0) and torch.equal(of_b != 0, b != 0) and not torch.equal(of_a, of_b)


def test_an_empty_input(backend):
    x = torch.empty(0, 5, requires_grad=True)
    functional.dropout(x, 0.5).sum().backward()
    assert x.grad.shape == (0, 5)


def test_export(x):
    module = nn.Sequential(nn.Linear(11, 3), Dropout(0.5))
    graph = str(torch.export.export(module, (x,)).graph)
    assert "fastreg.dropout" in graph
    assert "fastreg" not in str(torch.export.export(module.eval(), (x,)).graph)
