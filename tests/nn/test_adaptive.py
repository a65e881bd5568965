"""Dropout by importance."""

import copy
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastreg
from fastreg.nn import AdaptiveDropout, functional

KINDS = ["activation", "activation_gradient"]


def data(rows=64, features=8):
    """The importance of a feature grows with its index."""
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(0))
    return (x * torch.arange(1, features + 1)).requires_grad_()


def trained(passes=3, **options):
    module = AdaptiveDropout(8, 0.25, **options)
    for _ in range(passes):
        module(data()).sum().backward()
    return module


def seeded(seed, function, *args, **options):
    torch.manual_seed(seed)
    return function(*args, **options)


# Rates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", KINDS)
def test_less_important_neurons_are_dropped_more(importance):
    module = trained(importance=importance)
    rates = module.rates
    assert (rates.diff() < 0).all() and float(rates.mean()) == 0.25
    assert float(rates[0]) == 0.5 and float(rates[-1]) == 0
    y = module(data(4000))
    share = (y == 0).double().mean(0)
    assert (abs(share - rates) <= 5 * (rates * (1 - rates) / 4000).sqrt()).all()


def test_importance_is_a_running_mean():
    module = AdaptiveDropout(8, 0.5, momentum=0.75)
    assert not module.importance.any()
    x, expected = data(), torch.zeros(8)
    for factor in (1, 3, 0.1):
        module(factor * x)
        expected = 0.75 * expected + 0.25 * (factor * x.detach()).abs().mean(0)
    torch.testing.assert_close(module.importance, expected)


def test_importance_by_gradient():
    """Of all neurons, also of those that were dropped."""
    module, x = AdaptiveDropout(8, 0.5, "activation_gradient", momentum=0.0), data()
    weights = torch.randn(64, 8)
    y = module(x)
    assert not module.importance.any()
    (y * weights).sum().backward()
    torch.testing.assert_close(module.importance, (x * weights).abs().mean(0))


def test_gradients_decide():
    """A neuron that nobody listens to is dropped most, however loud it is."""
    module, weights = AdaptiveDropout(8, 0.25, "activation_gradient"), torch.ones(8)
    weights[-1] = 0
    (module(data()) * weights).sum().backward()
    assert float(module.rates[-1]) == 0.5
    module = AdaptiveDropout(8, 0.25)
    (module(data()) * weights).sum().backward()
    assert float(module.rates[-1]) == 0


@pytest.mark.parametrize("max_rate", [0.9, 1.0])
@pytest.mark.parametrize(
    "p, strength, features",
    [(0.1, 1, 7), (1 / 3, 0.5, 8), (0.7, 1, 5), (0.95, 1, 4), (1, 1, 4), (0, 1, 4), (0.3, 1, 1)],
)
def test_the_mean_rate_is_held(p, strength, features, max_rate):
    module = AdaptiveDropout(features, p, strength=strength, max_rate=max_rate)
    module(data(features=features))
    rates, target = module.rates, fastreg.nn.rates.drop_threshold(p) / 65536
    assert float(rates.mean()) == pytest.approx(target, abs=1e-15)
    assert float(rates.min()) >= 0 and float(rates.max()) <= max(max_rate, p) + 2**-17
    if features > 1:
        widest = max(min(strength * p, max_rate - p), 0)
        assert float(rates.max()) == pytest.approx(p + widest, abs=2**-16)


def test_equal_importances_have_equal_rates():
    """Dead neurons, say: their place in the layer tells nothing."""
    module = AdaptiveDropout(8, 0.25)
    x = torch.ones(4, 8)
    x[:, [1, 4, 5]] = 0
    x[:, 7] = 2
    module(x)
    rates = module.rates
    assert rates[1] == rates[4] == rates[5] == rates.max() and rates[0] == rates[2] == rates[3] == rates[6]
    assert rates[7] == rates.min() == 0 and float(rates.mean()) == pytest.approx(0.25, abs=2**-17)
    module.reset_parameters()
    module(torch.ones(4, 8))
    assert (module.rates == 0.25).all()


def test_uniform_before_anything_is_known():
    module, x = AdaptiveDropout(8, 0.25), data()
    assert (module.rates == 0.25).all()
    assert torch.equal(seeded(0, module, x), seeded(0, functional.dropout, x, 0.25))


def test_without_strength_it_is_dropout():
    module, x = trained(strength=0.0), data()
    assert torch.equal(seeded(0, module, x), seeded(0, functional.dropout, x, 0.25))


def test_the_mean_is_kept():
    module, n = trained(), 20_000
    rates = module.rates
    with fastreg.use_backend("reference"):
        y = module(torch.ones(n, 8)).double().mean(0)
    assert (abs(y - 1) <= 5 * (rates / ((1 - rates) * n)).sqrt()).all()


def test_the_same_on_every_backend(backend):
    module, x = trained(), data()
    x.grad = None
    rates = module.rates
    y = seeded(1, module, x)
    assert torch.equal(y, seeded(1, functional.dropout, x, rates))
    y.sum().backward()
    assert torch.equal(x.grad, seeded(1, functional.dropout, torch.ones_like(x), rates))


def test_a_new_rate():
    """At any time: what a backward pass needs is its own."""
    module, x = trained(), data()
    y = seeded(1, module, x)
    module.p = 0.1
    assert float(module.rates.mean()) == pytest.approx(0.1, abs=2**-17)
    module(x)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)
    with pytest.raises(TypeError, match="p must be a number"):
        module.p = [0.1] * 8


def test_other_dimensions():
    module = AdaptiveDropout(8, 0.25, dim=1, momentum=0.0)
    x = torch.randn(5, 8, 3) * torch.arange(1, 9)[:, None]
    module(x)
    torch.testing.assert_close(module.importance, x.abs().mean((0, 2)))
    assert float(module.rates[0]) == 0.5
    rates = module.rates
    assert torch.equal(seeded(1, module, x), seeded(1, functional.dropout, x, rates, dim=1))
    flat = AdaptiveDropout(3, 0.25, momentum=0.0)
    flat(torch.tensor([1.0, -2.0, 3.0]))
    assert flat.importance.tolist() == [1, 2, 3]


# State ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", KINDS)
def test_evaluation_changes_nothing(importance):
    module, x = trained(importance=importance), data()
    before = copy.deepcopy(module.state_dict())
    assert module.eval()(x) is x
    assert list(before) == ["importance"] and torch.equal(module.importance, before["importance"])


def test_it_goes_on_from_a_checkpoint():
    module, x = trained(), data()
    other = AdaptiveDropout(8, 0.25)
    other.load_state_dict(module.state_dict())
    for seed in range(3):
        assert torch.equal(seeded(seed, module, x), seeded(seed, other, x))
    assert torch.equal(module.importance, other.importance)


def test_copies_go_their_own_way():
    module, x = trained(), data()
    other = copy.deepcopy(module)
    other(10 * x)
    assert (other.importance > module.importance).all()
    other = copy.deepcopy(module)
    assert torch.equal(seeded(1, module, x), seeded(1, other, x))


def test_narrow_modules_measure_in_float32():
    """In bfloat16 a running mean with a momentum of 0.99 stands still 1/5 before its goal."""
    module = trained().bfloat16()
    assert module.importance.dtype == torch.float32 and torch.equal(module.importance, trained().importance)
    for _ in range(1200):
        module._measure(torch.full((4, 8), 2.0, dtype=torch.bfloat16))
    torch.testing.assert_close(module.importance, torch.full((8,), 2.0), rtol=1e-4, atol=0)
    assert module(data().bfloat16()).dtype == torch.bfloat16
    assert trained().double().importance.dtype == torch.float32


@pytest.mark.parametrize("importance", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_counted(importance, bad):
    """Such as the gradients of a step that a loss scaler skips."""
    module = trained(importance=importance)
    before = module.importance.clone()
    x = data().detach()
    x[3, 2] = bad
    (module(x.requires_grad_()) * torch.full((8,), 0.5)).sum().backward()
    changed = module.importance != before
    assert module.importance.isfinite().all() and not changed[2] and changed[3:].all()


def test_nothing_is_learned_from_nothing():
    module = trained()
    before = module.importance.clone()
    assert module(torch.ones(0, 8)).shape == (0, 8) and torch.equal(module.importance, before)


def test_it_starts_on_the_meta_device():
    with torch.device("meta"):
        module = AdaptiveDropout(8, 0.25)
    module.to_empty(device="cpu")
    assert not module.importance.any() and not module.seeds.any() and (module.rates == 0.25).all()


# Recomputation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("importance", KINDS)
@pytest.mark.parametrize("behind", [False, True])
def test_recomputation_sees_the_same_masks(importance, reentrant, behind):
    """In front of and behind other operations, twice in a pass."""
    weight = torch.randn(8, 8, dtype=torch.float64)

    def run(wrapped):
        module = AdaptiveDropout(8, 0.25, importance=importance, momentum=0.5).double()

        def body(x):
            return module(torch.tanh(x @ weight)) if behind else torch.tanh(module(x) @ weight)

        x, results = data().detach().double(), []
        for seed in range(3):
            torch.manual_seed(seed)
            leaf = x.clone().requires_grad_()
            y = leaf
            for _ in range(2):
                y = checkpoint(body, y, use_reentrant=reentrant) if wrapped else body(y)
            y.square().sum().backward()
            results += [y.detach(), leaf.grad]
        return results, module

    (results, ours), (expected, theirs) = run(True), run(False)
    assert all(map(torch.equal, results, expected))
    assert torch.equal(ours.importance, theirs.importance) and ours.importance.all()


@pytest.mark.parametrize("importance", KINDS)
def test_passes_that_overlap(importance):
    """As in a pipeline: a second pass begins before the first is through, and is recomputed after others."""

    def run(wrapped):
        module = AdaptiveDropout(8, 0.25, importance=importance, momentum=0.0)

        def body(x):
            return torch.tanh(module(torch.tanh(x)))

        def forward(x):
            return checkpoint(body, x, use_reentrant=False) if wrapped else body(x)

        torch.manual_seed(0)
        x = [(torch.randn(9, 8) * torch.randperm(8)).requires_grad_() for _ in range(3)]
        first, second = forward(x[0]), forward(x[1])
        first.sum().backward()
        third = forward(x[2])
        second.sum().backward()
        third.sum().backward()
        return [t.grad for t in x]

    assert all(map(torch.equal, run(True), run(False)))


@pytest.mark.parametrize("compiled", ["inside", "outside"])
def test_recomputation_of_what_is_compiled(compiled):
    """The gradient is that of the function, seen by finite differences."""
    module = AdaptiveDropout(8, 0.25, momentum=0.0)
    scales = torch.arange(1, 9)

    def body(x):
        return torch.tanh(module(x * scales).sum(-1)).square()

    if compiled == "inside":
        inner = torch.compile(body, backend="aot_eager", fullgraph=True)

        def function(x):
            return checkpoint(inner, x, use_reentrant=False).sum()
    else:
        function = torch.compile(
            lambda x: checkpoint(body, x, use_reentrant=False).sum(), backend="aot_eager", fullgraph=True
        )

    def value(x):
        """Each time from a state with other rates than those that follow from x."""
        module.importance.copy_(scales.flip(0))
        module.seeds.zero_()
        return seeded(1, function, x)

    generator = torch.Generator().manual_seed(0)
    x, direction = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64) / 8
    (gradient,) = torch.autograd.grad(value(x.requires_grad_()), x)
    h = 1e-6
    difference = (value(x + h * direction) - value(x - h * direction)).item() / (2 * h)
    assert abs(float((gradient * direction).sum()) - difference) < 1e-6 * abs(difference)


# Compilers and transforms --------------------------------------------------------------------------------


def test_compiles_into_one_graph():
    module, other, x = trained(), trained(), data()
    graphs = []
    compiled = torch.compile(module, fullgraph=True, backend=lambda g, _: graphs.append(g) or g)
    for seed, p in enumerate((0.25, 0.1, 0.5)):
        module.p = other.p = p
        assert torch.equal(seeded(seed, compiled, x), seeded(seed, other, x))
    assert len(graphs) == 1 and torch.equal(module.importance, other.importance)


def test_inductor():
    module, x = trained(momentum=0.0), data()
    rates = module.rates
    y = torch.compile(module, fullgraph=True)(x)
    assert 0 < int((y == 0).sum()) < y.numel()
    torch.testing.assert_close(y, torch.where(y != 0, x / (1 - rates), 0).float())
    torch.testing.assert_close(module.importance, x.detach().abs().mean(0))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own
def test_gradients_are_measured_around_a_graph():
    module, x = AdaptiveDropout(8, 0.25, "activation_gradient", momentum=0.0), data()
    (torch.compile(module, backend="aot_eager")(x) * 3).sum().backward()
    torch.testing.assert_close(module.importance, 3 * x.detach().abs().mean(0))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(module, backend="aot_eager", fullgraph=True)(x)


@pytest.mark.parametrize("importance", KINDS)
def test_func(importance):
    module, x = trained(importance=importance), data().detach()
    before, rates = module.importance.clone(), module.rates
    gradient = seeded(1, torch.func.grad(lambda x: module(x).sum()), x)
    assert torch.equal(gradient, seeded(1, functional.dropout, torch.ones_like(x), rates))
    each = torch.vmap(torch.func.grad(lambda x: module(x).sum()), randomness="different")(x)
    assert each.shape == x.shape and torch.equal(module.importance, before)


def test_refusals():
    with pytest.raises(ValueError, match=r"expected 8 features in dimension 1, got shape \(5, 3, 8\)"):
        AdaptiveDropout(8, 0.25, dim=1)(torch.ones(5, 3, 8))
    with pytest.raises(TypeError, match="floating dtype"):
        AdaptiveDropout(8)(torch.ones(8, dtype=torch.int64))
    for options, message in (
        ({"features": 0}, "features"), ({"importance": "x"}, "importance"), ({"momentum": 1}, "momentum"),
        ({"strength": 2}, "strength"), ({"p": math.nan}, "p must be"), ({"max_rate": 2}, "max_rate must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            AdaptiveDropout(**{"features": 8, **options})
    assert AdaptiveDropout(3.0)(torch.ones(2, 3)).shape == (2, 3)
    assert "features=8, p=0.25, importance='activation'" in repr(trained())
