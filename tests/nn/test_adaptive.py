"""Dropout by importance."""

import copy
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastreg
from fastreg.nn import AdaptiveDropout, functional


def data(rows=64, features=8):
    """The importance of a feature grows with its index."""
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(0))
    return (x * torch.arange(1, features + 1)).requires_grad_()


def trained(passes=3, **options):
    module = AdaptiveDropout(8, 0.25, **options)
    for _ in range(passes):
        module(data()).sum().backward()
    return module


@pytest.mark.parametrize("importance", ["activation", "activation_gradient"])
def test_less_important_neurons_are_dropped_more(importance):
    module = trained(importance=importance)
    rates = module.rates
    assert (rates.diff() < 0).all() and float(rates.mean()) == 0.25
    assert float(rates[0]) == 0.5 and float(rates[-1]) == 0
    y = module(data(4000))
    share = (y == 0).double().mean(0)
    assert (abs(share - rates) <= 5 * (rates * (1 - rates) / 4000).sqrt()).all()


@pytest.mark.parametrize(
    "p, strength, features", [(0.1, 1, 7), (1 / 3, 0.5, 8), (0.9, 1, 5), (1, 1, 4), (0.3, 1, 1)]
)
def test_the_mean_rate_is_held(p, strength, features):
    module = AdaptiveDropout(features, p, strength=strength)
    module(data(features=features)).sum().backward()
    rates, target = module.rates, fastreg.nn.rates.threshold(p) / 65536
    assert float(rates.mean()) == pytest.approx(target, abs=1e-15)
    assert float(rates.min()) >= 0 and float(rates.max()) <= 1
    if p * (1 + strength) <= 1 and features > 1:
        assert float(rates.max()) == pytest.approx(p * (1 + strength), abs=2**-16)


def test_uniform_before_anything_is_known():
    module, x = AdaptiveDropout(8, 0.25), data()
    torch.manual_seed(0)
    y = module(x)
    torch.manual_seed(0)
    assert torch.equal(y, functional.dropout(x, 0.25))
    assert (AdaptiveDropout(8, 0.25).rates == 0.25).all()


def test_the_mean_is_kept():
    module, n = trained(), 20_000
    with fastreg.use_backend("reference"):
        y = module(torch.ones(n, 8)).double().mean(0)
    rates = module.rates
    assert (abs(y - 1) <= 5 * (rates / ((1 - rates) * n)).sqrt()).all()


def test_evaluation_changes_nothing():
    module, x = trained(), data()
    before = copy.deepcopy(module.state_dict())
    assert module.eval()(x) is x
    assert all(map(torch.equal, module.state_dict().values(), before.values()))


def test_it_goes_on_from_a_checkpoint():
    module, x = trained(), data()
    other = AdaptiveDropout(8, 0.25)
    other.load_state_dict(module.state_dict())
    for _ in range(2):
        torch.manual_seed(1)
        ours = module(x)
        torch.manual_seed(1)
        theirs = other(x)
        assert torch.equal(ours, theirs)
        ours.sum().backward()
        theirs.sum().backward()
    assert torch.equal(module.importance, other.importance) and int(module.passes) == 5


def test_a_new_rate():
    module = trained()
    module.p = 0.1
    assert float(module.rates.mean()) == pytest.approx(0.1, abs=2**-17)
    module(data())
    assert torch.equal(module.levels, module._levels())
    with pytest.raises(ValueError, match="p must be one rate"):
        module.p = [0.1] * 8


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("importance", ["activation", "activation_gradient"])
@pytest.mark.parametrize("behind", [False, True])
def test_recomputation_sees_the_same_masks(importance, reentrant, behind):
    """In front of and behind other operations, twice in a pass."""
    weight = torch.randn(8, 8, dtype=torch.float64)

    def run(wrapped):
        module = AdaptiveDropout(8, 0.25, importance=importance).double()

        def body(x):
            return module(torch.tanh(x @ weight)) if behind else torch.tanh(module(x) @ weight)

        x, found = data().detach().double(), []
        for seed in range(3):
            torch.manual_seed(seed)
            own = x.clone().requires_grad_()
            y = own
            for _ in range(2):
                y = checkpoint(body, y, use_reentrant=reentrant) if wrapped else body(y)
            y.square().sum().backward()
            found += [y.detach(), own.grad]
        return found, module

    (found, ours), (expected, theirs) = run(True), run(False)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(ours.importance, theirs.importance) and torch.equal(ours.passes, theirs.passes)


def test_compiles_into_one_graph():
    module, x = trained(), data()
    graphs = []
    compiled = torch.compile(module, fullgraph=True, backend=lambda g, _: graphs.append(g) or g)
    passes = int(module.passes)
    for p in (0.25, 0.1, 0.5):
        module.p = p
        rates = module.rates
        assert compiled(x).shape == x.shape and float(rates.mean()) == pytest.approx(p, abs=2**-16)
    assert len(graphs) == 1 and int(module.passes) == passes + 3


def test_other_dimensions_and_refusals():
    module = AdaptiveDropout(8, 0.25, dim=1)
    x = torch.randn(5, 8, 3) * torch.arange(1, 9)[:, None]
    module(x.requires_grad_()).sum().backward()
    assert float(module.rates[0]) == 0.5
    with pytest.raises(ValueError, match=r"expected 8 features in dimension 1, got shape \(5, 3, 8\)"):
        module(x.transpose(1, 2))
    for options, message in (
        ({"features": 0}, "features"), ({"importance": "x"}, "importance"), ({"momentum": 1}, "momentum"),
        ({"strength": 2}, "strength"), ({"p": math.nan}, "p must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            AdaptiveDropout(**{"features": 8, **options})
    assert "features=8, p=0.25, importance='activation'" in repr(module)
