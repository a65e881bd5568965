"""Penalties on weights against plain PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import fastreg
from fastreg.engine.launch import triton as launchers

PENALTIES = {
    "l1": (fastreg.l1_penalty, lambda t: t.abs().sum()),
    "l2": (fastreg.l2_penalty, lambda t: t.pow(2).sum()),
}


@pytest.fixture(params=PENALTIES)
def penalty(request):
    """Ours, and torch's for one tensor."""
    return PENALTIES[request.param]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 40), nn.ReLU(), nn.Linear(40, 33))


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_value_and_gradients_are_torchs(penalty, name, close, number):
    ours, theirs = penalty
    net, twin = model(), model().double()
    x, y = torch.randn(5, 7), torch.randint(33, (5,))
    expected = F.cross_entropy(twin(x.double()), y) + 0.3 * sum(map(theirs, twin.parameters()))
    with fastreg.use_backend(name):
        loss = F.cross_entropy(net(x), y) + 0.3 * ours(net)
        loss.backward()
    expected.backward()
    assert number(loss) == pytest.approx(number(expected), rel=1e-6)
    close([p.grad for p in net.parameters()], [p.grad.float() for p in twin.parameters()])


def test_what_stands_for_parameters(penalty, number):
    ours, theirs = penalty
    net = model()
    expected = number(sum(map(theirs, net.parameters())))
    for params in (net, net.parameters(), net.named_parameters(), list(net.parameters())):
        assert number(ours(params)) == pytest.approx(expected, rel=1e-6)
    assert number(ours(net[0].weight)) == pytest.approx(number(theirs(net[0].weight)), rel=1e-6)


def test_frozen_parameters_of_a_model_do_not_count_listed_ones_do(penalty, number):
    ours, theirs = penalty
    net = model()
    net[0].requires_grad_(False)
    trained, whole = (number(sum(map(theirs, part.parameters()))) for part in (net[2], net))
    assert number(ours(net)) == pytest.approx(trained, rel=1e-6)
    assert number(ours(net.parameters())) == pytest.approx(whole, rel=1e-6)
    ours(net.parameters()).backward()
    assert net[0].weight.grad is None and net[2].weight.grad is not None


def test_a_strength_scales_value_and_gradient(penalty, close, number):
    ours, _ = penalty
    p = torch.randn(50, requires_grad=True)
    strength = torch.tensor(0.5, requires_grad=True)
    ours([p], 0.5).backward()
    first, p.grad = p.grad, None
    ours([p], strength).backward()
    close(p.grad, first)
    assert number(strength.grad) == pytest.approx(number(ours([p])), rel=1e-6)


def test_tied_parameters_count_once(penalty, number):
    ours, theirs = penalty
    net = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
    net[1].weight = net[0].weight
    assert number(ours(net)) == pytest.approx(number(theirs(net[0].weight)), rel=1e-6)


def test_derivatives_of_any_order(penalty):
    ours, _ = penalty
    tensors = [torch.randn(3, 4, dtype=torch.float64), torch.randn(2, dtype=torch.float64)]
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: ours(t) ** 2, tensors)
    assert torch.autograd.gradgradcheck(lambda *t: ours(t) ** 2, tensors)


def test_function_transforms(penalty, close):
    ours, theirs = penalty
    x = torch.randn(6, 3)
    close(
        torch.func.grad(lambda t: ours([t, 2 * t]))(x),
        torch.func.grad(lambda t: theirs(t) + theirs(2 * t))(x),
    )
    close(torch.vmap(lambda t: ours([t]))(x), torch.vmap(theirs)(x))
    close(torch.vmap(torch.func.grad(lambda t: ours([t])))(x), torch.vmap(torch.func.grad(theirs))(x))


def test_compiles_into_one_graph(penalty, close, number):
    ours, theirs = penalty
    net, twin = model(), model()
    x = torch.randn(5, 7)
    compiled = torch.compile(lambda: net(x).sum() + ours(net, 0.1), backend="aot_eager", fullgraph=True)
    compiled().backward()
    (twin(x).sum() + 0.1 * sum(map(theirs, twin.parameters()))).backward()
    close([p.grad for p in net.parameters()], [p.grad for p in twin.parameters()])
    with torch.no_grad():
        assert number(compiled()) == pytest.approx(number(net(x).sum() + ours(net, 0.1)), rel=1e-6)


def test_penalty_of_complex_numbers(close):
    p = torch.randn(9, dtype=torch.complex64, requires_grad=True)
    (gradient,) = torch.autograd.grad(fastreg.l2_penalty([p]), p)
    (expected,) = torch.autograd.grad(p.abs().square().sum(), p)
    close(torch.view_as_real(gradient), torch.view_as_real(expected))
    assert torch.equal(fastreg.l2_penalty(p.detach().conj()), fastreg.l2_penalty(p.detach()))
    with pytest.raises(TypeError, match="l1_penalty"):
        fastreg.l1_penalty([p])


def test_one_launch_for_each_direction(penalty, monkeypatch):
    ours, _ = penalty
    calls = []
    for name in ("run", "partial_norms"):
        inner = getattr(launchers, name)
        monkeypatch.setattr(
            launchers, name, lambda *a, name=name, inner=inner: (calls.append(name), inner(*a))[1]
        )
    with fastreg.use_backend("triton"):
        ours(model()).backward()
    assert calls == ["partial_norms", "run"]


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "no tensors$"),
        (iter([]), ValueError, "no tensors; an iterator may be used up: give it a list"),
        (nn.ReLU(), ValueError, "require gradients"),
        ({"a": torch.zeros(1)}, TypeError, "dict"),
        (3, TypeError, "int"),
        ([3], TypeError, "int"),
        ([torch.zeros(2, dtype=torch.int64)], TypeError, "int64"),
    ],
)
def test_what_penalties_refuse(penalty, params, error, message):
    with pytest.raises(error, match=message):
        penalty[0](params)


@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf, torch.ones(2)], ids=str)
def test_strengths_out_of_range(penalty, strength):
    with pytest.raises(ValueError, match="strength must be"):
        penalty[0]([torch.zeros(1)], strength)
