"""Noise on weights: its moments, and that weights are restored, whatever happens."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import fastreg
from fastreg import WeightNoise
from fastreg.nn import NoiseScheduler
from fastreg.schedules import Linear

from .conftest import values

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [(33, 65), (7,), (), (0, 3), (4113,)]


def draw(dtype=torch.float32, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def drawn(noise, params):
    """What is added, in float64."""
    before = values(params)
    with noise.perturbed():
        return [p.detach().double() - q.double() for p, q in zip(params, before, strict=True)]


def bits(tensors):
    return [t.detach().reshape(-1).view(torch.uint8) for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "triton"])  # the compiled one: below
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
def test_weights_come_back_bit_for_bit(backend, dtype):
    with fastreg.use_backend(backend):
        come_back(dtype)


def come_back(dtype):
    params = draw(dtype)
    with torch.no_grad():
        params[0][0, :4] = torch.tensor([-0.0, math.inf, -math.inf, 0.0], dtype=dtype)
    before, places = values(params), [p.data_ptr() for p in params]
    noise = WeightNoise(params, 0.1)
    with pytest.raises(ZeroDivisionError):
        with noise.perturbed():
            assert noise.is_perturbed and not torch.equal(params[0], before[0])
            raise ZeroDivisionError
    assert not noise.is_perturbed and all(map(torch.equal, bits(params), bits(before)))
    noise.perturb()
    assert not torch.equal(params[-1], before[-1])
    noise.restore()
    noise.restore()
    assert all(map(torch.equal, bits(params), bits(before))) and places == [p.data_ptr() for p in params]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_backend_draws_the_same(dtype, relative, same):
    def under(backend):
        params = draw(dtype)
        before, noise = values(params), WeightNoise(params, 0.1, relative, seed=7)
        with fastreg.use_backend(backend):
            with noise.perturbed():
                noisy = values(params)
        assert all(map(torch.equal, bits(params), bits(before)))
        return noisy

    expected = under("reference")
    if dtype == torch.float32:  # compiling takes seconds
        assert all(map(torch.equal, under("compiled"), expected))
    assert all(map(same, under("triton"), expected))


def within(z, bound=5):
    """Mean, variance and fourth moment of standard normals, in units of their standard errors."""
    z, n = z.double().flatten(), z.numel()
    return (
        abs(float(z.mean())) * math.sqrt(n) < bound
        and abs(float(z.square().mean()) - 1) * math.sqrt(n / 2) < bound
        and abs(float((z**4).mean()) - 3) * math.sqrt(n / 96) < bound
    )


def test_noise_is_normal_of_a_std():
    params = draw(sizes=[(300, 500), (50_000,)])
    with fastreg.use_backend("reference"):
        a, b = drawn(WeightNoise(params, 0.02, seed=1), params)
        assert within(a / 0.02) and within(b / 0.02)
        shares = drawn(WeightNoise(params, 0.02, relative=True, seed=1), params)
    for share, p in zip(shares, params, strict=True):
        assert within(share / (0.02 * p.detach().double().abs()))
    assert abs(float((a.flatten()[:50_000] * b).sum())) < 5 * 0.02**2 * math.sqrt(50_000)


def test_small_noise_is_not_lost_in_bfloat16():
    """A small part of a unit in the last place: rounded at random, the mean is that of the weights."""
    params = [Parameter(torch.full((2**16,), 1.0, dtype=torch.bfloat16))]
    std = torch.finfo(torch.bfloat16).eps / 40
    with fastreg.use_backend("reference"):
        (added,) = drawn(WeightNoise(params, std, seed=1), params)
        (lost,) = drawn(WeightNoise(params, std, rounding="nearest", seed=1), params)
    assert not lost.any()
    # Rounded down below 1, where units are half as large, and up: E|z| std / unit of all move.
    share = math.sqrt(2 / math.pi) / 40 * 1.5
    assert abs(float((added != 0).double().mean()) - share) < 5 * math.sqrt(share / 2**16)
    assert abs(float(added.mean())) < 5 * float(added.std()) / 2**8


def test_relative_noise_leaves_zeros_alone(backend):
    params = [Parameter(torch.tensor([0.0, 1.0] * 500))]
    with WeightNoise(params, 0.1, relative=True).perturbed():
        assert not params[0][::2].any() and (params[0][1::2] != 1).all()


def test_each_perturbation_and_each_instance_has_noise_of_its_own():
    params = draw()
    with fastreg.use_backend("reference"):
        one, other = WeightNoise(params, 0.1), WeightNoise(params, 0.1)
        draws = [drawn(noise, params)[0] for noise in (one, one, other, one)]
        assert len({bytes(t.numpy()) for t in draws}) == 4
        assert torch.equal(*(drawn(WeightNoise(params, 0.1, seed=5), params)[0] for _ in range(2)))
    twins = [Parameter(torch.zeros(1000)) for _ in range(2)]
    a, b = drawn(WeightNoise(twins, 0.1), twins)
    assert not torch.equal(a, b)


def test_parameters_without_gradients_take_part():
    params = draw(sizes=[(50,), (50,)])
    params[0].grad = torch.ones(50)
    params[1].requires_grad_(False)
    assert all(bool((z != 0).all()) for z in drawn(WeightNoise(params, 0.1), params))
    assert torch.equal(params[0].grad, torch.ones(50))


def test_gradients_are_those_of_the_noisy_weights():
    model, x = nn.Linear(5, 3), torch.randn(4, 5)
    noise = WeightNoise(model.parameters(), 0.5, seed=3)
    with noise.perturbed():
        model(x).square().sum().backward()
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert all(map(torch.equal, (p.grad for p in model.parameters()), expected))
    clean = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert not torch.allclose(clean[0], expected[0])


def test_a_backward_pass_after_the_weights_are_back_is_refused(backend):
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))
    noise = WeightNoise(model.parameters(), 0.5)
    with noise.perturbed():
        loss = model(torch.randn(4, 5)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def trained(model, noise, optimizer, steps):
    for step in steps:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        with noise.perturbed():
            model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_resumed_run_draws_the_same(tmp_path):
    def start():
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        return model, WeightNoise(model.parameters(), 0.1), fastreg.SGD(model.parameters(), lr=0.01)

    model, noise, optimizer = start()
    trained(model, noise, optimizer, range(5))
    whole = values(model.parameters())
    model, noise, optimizer = start()
    noise.load_state_dict({"seed": 12, "step": 0})
    trained(model, noise, optimizer, range(3))
    torch.save([model.state_dict(), noise.state_dict()], tmp_path / "checkpoint")
    trained(model, noise, optimizer, range(3, 5))
    expected = values(model.parameters())
    assert not torch.equal(whole[0], expected[0])
    model, noise, optimizer = start()
    noise.perturb()  # a count that loading replaces
    noise.restore()
    weights, state = torch.load(tmp_path / "checkpoint")
    model.load_state_dict(weights)
    noise.load_state_dict(state)
    trained(model, noise, optimizer, range(3, 5))
    assert all(map(torch.equal, values(model.parameters()), expected))


def test_groups_and_levels():
    a, b, c = draw(sizes=[(1000,), (1000,), (1000,)])
    noise = WeightNoise(
        [{"params": [("a", a)]}, {"params": [("b", b)], "std": 0.5, "relative": True},
         {"params": [("c", c)], "std": 0.0}], 0.1,
    )  # fmt: skip
    of_a, of_b, of_c = drawn(noise, [a, b, c])
    assert within(of_a / 0.1) and within(of_b / (0.5 * b.detach().double().abs())) and not of_c.any()
    scheduler = NoiseScheduler(noise, Linear(1.0, steps=2))
    scheduler.step()
    assert [group["std"] for group in noise.param_groups] == [0.05, 0.25, 0.0]
    assert within(drawn(noise, [a])[0] / 0.05)
    scheduler.step()
    assert not any(z.any() for z in drawn(noise, [a, b, c]))
    noise.std = 0.2
    assert [group["std"] for group in noise.param_groups] == [0.2] * 3 and noise.std == 0.2


def test_parameters_of_any_layout_and_kind(backend):
    dense = Parameter(torch.randn(6, 5).t())
    last = Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    pairs = Parameter(torch.randn(40, dtype=torch.complex64))
    params = [dense, last, pairs]
    before, strides = values(params), [p.stride() for p in params]
    noise = WeightNoise(params, 0.1)
    with noise.perturbed():
        assert all(bool((p != q).all()) for p, q in zip(params, before, strict=True))
    assert all(map(torch.equal, params, before)) and strides == [p.stride() for p in params]


def test_one_launch(monkeypatch):
    launches = []
    monkeypatch.setattr(fastreg.engine.launch, "run", launches.append)
    noise = WeightNoise(draw(), 0.1)
    noise.perturb()
    assert len(launches) == 1
    noise.restore()
    assert len(launches) == 2


def test_copies_are_perturbed_alone():
    params = draw()
    noise = WeightNoise(params, 0.1, seed=3)
    other = copy.deepcopy(noise)
    before = values(params)
    with other.perturbed():
        assert all(map(torch.equal, params, before))
        theirs = values(other.param_groups[0]["params"])
    with noise.perturbed():
        assert all(map(torch.equal, values(params), theirs))


def test_what_is_wrong_says_so():
    params = draw()
    for bad in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="std must be finite and >= 0, got std="):
            WeightNoise(params, bad)
    with pytest.raises(ValueError, match="std must be"):
        WeightNoise([{"params": params, "std": -1.0}], 0.1)
    with pytest.raises(ValueError, match="rounding must be"):
        WeightNoise(params, 0.1, rounding="up")
    with pytest.raises(TypeError, match="floating dtype, got torch.int64"):
        WeightNoise([torch.zeros(3, dtype=torch.int64)], 0.1)
    with pytest.raises(ValueError, match="seed must fit in 64 bits"):
        WeightNoise(params, 0.1, seed=2**64)
    noise = WeightNoise(params, 0.1)
    with pytest.raises(ValueError, match="std=-2"):
        noise.std = -2
    with noise.perturbed():
        with pytest.raises(RuntimeError, match=r"perturbed already: call restore\(\) first"):
            noise.perturb()
        for call in (noise.state_dict, lambda: noise.load_state_dict({"seed": 1, "step": 0})):
            with pytest.raises(
                RuntimeError, match=r"while the weights are perturbed: call restore\(\) first"
            ):
                call()
    assert "seed=" in repr(noise)


def test_no_weights_are_no_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with WeightNoise([torch.zeros(0)], 0.1).perturbed():
            pass
