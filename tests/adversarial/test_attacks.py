"""Attacks against closed forms and definitions, and that they leave ball and bounds alone."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import fastreg
from fastreg.adversarial import ffgsm, fgsm, fgsm_attack, pgd
from fastreg.ops import adversarial as adversarial_ops

EPSILON = 8 / 255
NORMS = {"linf": math.inf, "l2": 2, "l1": 1}
ALL_NORMS = pytest.mark.parametrize("norm", NORMS)


class Logistic(nn.Module):
    """Logits (0, w·x + b): the loss rises against w where y = 1, along w where y = 0."""

    def __init__(self, features=7):
        super().__init__()
        self.linear = nn.Linear(features, 1)

    def forward(self, x):
        z = self.linear(x)
        return torch.cat([torch.zeros_like(z), z], 1)


@pytest.fixture
def logistic():
    torch.manual_seed(0)
    return Logistic()


@pytest.fixture
def points():
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 1, 0, 1])


def gradients(model, x, y):
    """Of the sum of losses in eval mode, as one writes it by hand."""
    modes = [module.training for module in model.modules()]
    model.eval()
    leaf = x.detach().clone().requires_grad_()
    functional.cross_entropy(model(leaf), y, reduction="sum").backward()
    model.zero_grad(set_to_none=True)
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    return leaf.grad


def per_sample(t, norm):
    return torch.linalg.vector_norm(t.double().flatten(1), NORMS[norm], dim=1)


# Closed forms ---------------------------------------------------------------------------------------------


def test_fgsm_of_logistic_regression(logistic, points):
    """x - ε sign(w) (2y - 1) exactly, and every margin falls by ε ‖w‖₁."""
    x, y = points
    adversarial = fgsm(logistic, x, y, 0.1, bounds=None)
    w, side = logistic.linear.weight[0].detach(), (2 * y - 1)[:, None]
    assert torch.equal(adversarial, x - 0.1 * w.sign() * side)
    with torch.no_grad():
        drop = (side * (logistic.linear(x) - logistic.linear(adversarial))).double()
    torch.testing.assert_close(
        drop, torch.full_like(drop, 0.1 * float(w.double().abs().sum())), rtol=1e-5, atol=0
    )


def test_targeted_goes_the_other_way(logistic, points):
    x, y = points
    w, side = logistic.linear.weight[0].detach(), (2 * y - 1)[:, None]
    assert torch.equal(fgsm(logistic, x, y, 0.1, bounds=None, targeted=True), x + 0.1 * w.sign() * side)
    towards = pgd(logistic, x, 1 - y, 0.1, 0.1, 1, bounds=None, targeted=True, random_start=False)
    assert torch.equal(towards, fgsm(logistic, x, y, 0.1, bounds=None))


@ALL_NORMS
def test_pgd_of_a_linear_model_ends_where_fgsm_does(logistic, points, norm):
    """In the L1 ball with the one coordinate that gains most."""
    x, y = points
    one = fgsm(logistic, x, y, 0.5, norm, None, steepest=norm == "l1")
    many = pgd(logistic, x, y, 0.5, 0.2, 40, norm, None, steepest=norm == "l1")
    torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-5)


@ALL_NORMS
def test_pgd_of_one_step_is_fgsm(model, x, y, norm):
    one = pgd(model, x, y, EPSILON, EPSILON, 1, norm, random_start=False)
    whole = fgsm(model, x, y, EPSILON, norm)
    if norm == "linf":
        assert torch.equal(one, whole)
    else:  # PGD measures the step that it has taken, to project it
        torch.testing.assert_close(one, whole, rtol=1e-6, atol=1e-7)


def test_steps_match_their_definitions(model, x, y):
    g = gradients(model, x, y)
    each = (-1, 1, 1, 1)
    expected = {
        "linf": EPSILON * g.sign(),
        "l2": EPSILON * g / per_sample(g, "l2").clamp(min=1e-12).view(each).float(),
        "l1": EPSILON * g / per_sample(g, "l1").clamp(min=1e-12).view(each).float(),
    }
    for norm, step in expected.items():
        torch.testing.assert_close(fgsm(model, x, y, EPSILON, norm, None), x + step, rtol=0, atol=1e-7)
        assert torch.equal(fgsm(model, x, y, EPSILON, norm, None) - x != 0, step != 0) or norm != "linf"
    largest = g.flatten(1).abs().argmax(1, keepdim=True)
    one = torch.zeros_like(g.flatten(1)).scatter(1, largest, g.flatten(1).gather(1, largest).sign())
    adversarial = fgsm(model, x, y, EPSILON, "l1", None, steepest=True)
    assert torch.equal(adversarial, x + EPSILON * one.view_as(x))


def test_steps_may_be_a_whole_float(model, x, y):
    attacked = []
    for steps in (3, 3.0):
        torch.manual_seed(0)
        attacked.append(pgd(model, x, y, 0.1, steps=steps))
    assert torch.equal(*attacked) and not torch.equal(attacked[0], x)


def tutorial(image, epsilon, data_grad):
    return torch.clamp(image + epsilon * data_grad.sign(), 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fgsm_attack_is_the_tutorials(dtype):
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1, 28, 28), (7,), (), (0, 3), (3, 5, 4)):
        image = torch.rand(shape, generator=generator, dtype=dtype)
        gradient = torch.randn(shape, generator=generator, dtype=dtype)
        gradient.view(-1)[::5] = math.nan
        for epsilon in (0, 0.05, 0.3):
            assert torch.equal(fgsm_attack(image, epsilon, gradient), tutorial(image, epsilon, gradient))
    image = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    attacked = fgsm_attack(image, 0.1, torch.randn(2, 3, 4, 5))
    assert attacked.stride() == image.stride()


def test_fgsm_attack_within_a_graph():
    def f(image, gradient):
        return fgsm_attack(image, 0.1, gradient) * 2

    image, gradient = torch.rand(3, 4), torch.randn(3, 4)
    assert torch.equal(
        torch.compile(f, fullgraph=True, backend="aot_eager")(image, gradient), f(image, gradient)
    )


def test_ffgsm_is_the_step_from_its_start(logistic, points):
    """Of a linear model the gradient's sign is the same everywhere."""
    x, y = points
    torch.manual_seed(5)
    adversarial = ffgsm(logistic, x, y, 0.1, bounds=None)
    direction = (fgsm(logistic, x, y, 1.0, bounds=None) - x).sign()
    assert (
        ((adversarial - x) * direction <= 0.1 + 1e-6) & ((adversarial - x) * direction >= 0.025 - 1e-6)
    ).all()
    assert not torch.equal(adversarial, fgsm(logistic, x, y, 0.1, bounds=None))


# Ball and bounds ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    norm=st.sampled_from(sorted(NORMS)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    shape=st.sampled_from([(3, 11), (2, 3, 4), (1, 5), (4, 1)]),
    epsilon=st.floats(0, 2), steps=st.integers(1, 3), alpha=st.floats(0, 3), seed=st.integers(0, 2**32),
    start=st.booleans(), steepest=st.booleans(),
)  # fmt: skip
def test_never_outside(norm, dtype, shape, epsilon, steps, alpha, seed, start, steepest):
    """Exactly within for 16 bits, up to rounding for others; within bounds exactly."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    w = torch.randn(shape[1:], generator=generator, dtype=torch.float64).to(dtype)

    def loss(x, y):
        return (x * w).square().sum(tuple(range(1, x.dim()))) + (x * w).sum()

    results = [
        pgd(loss, x, None, epsilon, alpha, steps, norm, random_start=start, steepest=steepest),
        fgsm(loss, x, None, epsilon, norm, steepest=steepest),
    ]
    for made in results:
        assert made.dtype == dtype and made.shape == x.shape
        assert ((made >= 0) & (made <= 1)).all()
        away = per_sample(made.double() - x.double(), norm)
        if dtype.itemsize == 2 and norm == "linf":
            assert (away <= torch.tensor(epsilon).float().double()).all()
        else:  # arithmetic in float32 rounds, storage in 16 bits adds nothing
            eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            assert (away <= epsilon * (1 + 8 * eps) + 2 * eps * x[0].numel()).all()


@ALL_NORMS
def test_random_starts_fill_the_ball(norm):
    """Uniformly: P(distance <= r ε) = r ** n."""
    torch.manual_seed(0)
    x, n = torch.zeros(4000, 5), 5
    start = pgd(lambda x, y: 0 * x.sum(), x, None, 2.0, 0.0, 1, norm, None)
    size = per_sample(start, norm) / 2
    for r in (0.5, 0.8, 0.9):
        p = r**n
        assert abs(int((size <= r).sum()) - 4000 * p) < 5 * math.sqrt(4000 * p * (1 - p))
    assert size.max() <= 1 + 1e-6 and abs(start.mean()) < 5 * float(start.std()) / math.sqrt(start.numel())


def test_small_steps_of_16_bit_inputs_add_up(logistic, points):
    """Each is smaller than half a unit in the last place."""
    x, y = points
    x = (x.abs() + 1).bfloat16()
    logistic = logistic.bfloat16()
    adversarial = pgd(logistic, x, y, 0.125, 0.125 / 64, 64, bounds=None, random_start=False)
    assert torch.equal(adversarial, fgsm(logistic, x, y, 0.125, bounds=None)) and not torch.equal(
        adversarial, x
    )


def test_bounds_of_each_channel(model, x, y):
    """As clamping to them; whichever way they are given."""
    low, high = torch.tensor([0.0, 0.1, 0.2]), torch.tensor([1.0, 0.9, 0.8])
    wide = (low.view(3, 1, 1), high.view(1, 3, 1, 1))
    inside = torch.minimum(torch.maximum(x, wide[0]), wide[1])
    free = fgsm(model, inside, y, 0.2, bounds=None)
    expected = torch.minimum(torch.maximum(free, wide[0]), wide[1])
    for bounds in ((low, high), wide, (wide[0].expand(3, 5, 4), wide[1])):
        assert torch.equal(fgsm(model, inside, y, 0.2, bounds=bounds), expected)
    half = torch.maximum(free, wide[0]).clamp(max=1)
    assert torch.equal(fgsm(model, inside, y, 0.2, bounds=(low, 1.0)), half)
    last = inside.to(memory_format=torch.channels_last)
    adversarial = fgsm(model, last, y, 0.2, bounds=(low, high))
    assert adversarial.stride() == last.stride()
    torch.testing.assert_close(adversarial, expected)
    mixed = torch.rand(3, 1, 4) * 0.2  # what varies is not adjacent
    bounded = fgsm(model, torch.maximum(x, mixed), y, 0.2, bounds=(mixed, 1.0))
    free = fgsm(model, torch.maximum(x, mixed), y, 0.2, bounds=None)
    assert torch.equal(bounded, torch.maximum(free, mixed).clamp(max=1))


@ALL_NORMS
def test_epsilon_of_each_sample(model, x, y, norm):
    epsilon = torch.tensor([0.0, 0.01, 0.02, 0.03, 0.04, 0.05])
    adversarial = fgsm(model, x, y, epsilon, norm, None)
    for i, radius in enumerate(epsilon.tolist()):
        torch.testing.assert_close(adversarial[i], fgsm(model, x, y, radius, norm, None)[i])
    projected = pgd(model, x, y, epsilon, 0.05, 2, norm, None, random_start=False)
    assert (per_sample(projected - x, norm) <= epsilon.double() + 1e-6).all()


# What comes in --------------------------------------------------------------------------------------------


def test_gradients_that_are_not_numbers_or_zero():
    x = torch.full((3, 4), 0.5)
    g = torch.tensor([[math.nan, 1.0, -2.0, 0.0], [0.0] * 4, [math.inf, 3.0, 4.0, 0.0]])

    class FixedGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum(1)

        @staticmethod
        def backward(ctx, _):
            return g

    def loss(x, y):
        return FixedGradient.apply(x)

    sign = torch.tensor([[0.0, 1, -1, 0], [0.0] * 4, [1.0, 1, 1, 0]])
    assert torch.equal(fgsm(loss, x, None, 0.1), x + 0.1 * sign)
    scaled = torch.tensor([[0, 1, -2, 0], [0.0] * 4, [0, 3, 4, 0]]) / torch.tensor([[5.0**0.5], [1], [5]])
    torch.testing.assert_close(fgsm(loss, x, None, 0.1, "l2"), x + 0.1 * scaled)
    for norm in NORMS:
        for adversarial in (
            fgsm(loss, x, None, 0.1, norm),
            pgd(loss, x, None, 0.1, norm=norm, random_start=False),
        ):
            assert adversarial.isfinite().all() and torch.equal(adversarial[1], x[1])


def test_float16_gradients_do_not_flush():
    """The mean over 4096 samples of small losses has hardly a gradient left in float16; their sum has."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(16, 2).half(), torch.rand(4096, 16).half(), torch.zeros(4096).long()
    with torch.no_grad():
        model.bias.copy_(torch.tensor([9.0, 0.0]))
    leaf = x.clone().requires_grad_()
    functional.cross_entropy(model(leaf).float(), y).backward()
    assert float((leaf.grad == 0).float().mean()) > 0.9
    assert (fgsm(model, x, y, 0.1, bounds=None) != x).all()


def test_losses_and_outputs(model, x, y):
    """Logits as `.logits`, a loss for each sample, their mean, probabilities, and labels of every pixel."""
    expected = fgsm(model, x, y, EPSILON)
    model.eval()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return SimpleNamespace(logits=self.inner(x))

    assert torch.equal(fgsm(Wrapped(), x, y, EPSILON), expected)
    for reduction in ("none", "sum", "mean"):
        adversarial = fgsm(
            lambda x, y, kind=reduction: functional.cross_entropy(model(x), y, reduction=kind), x, y, EPSILON
        )
        assert torch.equal(adversarial, expected)
    assert torch.equal(fgsm(model, x, functional.one_hot(y, 3).float(), EPSILON), expected)
    segment, labels = nn.Conv2d(3, 3, 1), torch.randint(0, 3, (6, 5, 4))
    assert torch.equal(
        fgsm(segment, x, labels, EPSILON),
        tutorial(x, EPSILON, gradients(segment, x, labels)),
    )


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_inputs_of_every_kind(model, x, y, backend):
    with fastreg.use_backend(backend):
        expected = fgsm(model, x, y, EPSILON)
        for other in (
            x.clone().requires_grad_(),
            x.clone().requires_grad_() * 1,
            x.transpose(2, 3).transpose(2, 3),
        ):
            adversarial = fgsm(model, other, y, EPSILON)
            assert (
                torch.equal(adversarial, expected) and not adversarial.requires_grad and adversarial.is_leaf
            )
        last = x.to(memory_format=torch.channels_last)
        assert fgsm(model, last, y, EPSILON).stride() == last.stride()
        torch.testing.assert_close(fgsm(model, last, y, EPSILON), expected)
        spread = x[:1].expand(6, -1, -1, -1)
        assert torch.equal(fgsm(model, spread, y, EPSILON), fgsm(model, spread.clone(), y, EPSILON))
        assert torch.equal(fgsm(model, x[:0], y[:0], EPSILON), x[:0])
        with torch.no_grad():
            assert torch.equal(fgsm(model, x, y, EPSILON), expected)
        with torch.inference_mode():
            assert torch.equal(fgsm(model, x * 1, y * 1, EPSILON), expected)
            assert pgd(model, x * 1, y * 1, EPSILON).shape == x.shape
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fgsm(model, x, y, EPSILON).dtype == x.dtype


@ALL_NORMS
def test_backends_agree(model, x, y, norm):
    results = []
    for backend in ("reference", "triton"):
        with fastreg.use_backend(backend):
            torch.manual_seed(0)
            results.append(pgd(model, x, y, 0.1, steps=2, norm=norm))
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_a_step_is_one_launch(model, x, y, monkeypatch):
    launched = []
    launch = adversarial_ops.launch_step
    monkeypatch.setattr(adversarial_ops, "launch_step", lambda *a: (launched.append(1), launch(*a)))
    with fastreg.use_backend("triton"):
        pgd(model, x, y, EPSILON, steps=3)
    assert len(launched) == 4  # the start and three steps


# Restarts -------------------------------------------------------------------------------------------------


def bumps(x, y):
    return (torch.sin(7 * x) + 0.1 * x).sum(1)


def test_the_best_is_kept():
    torch.manual_seed(0)
    x = torch.rand(50, 2)
    generators = [torch.Generator().manual_seed(1) for _ in range(3)]
    one = bumps(pgd(bumps, x, None, 0.9, 0.05, 5, generator=generators[0]), None)
    best = bumps(pgd(bumps, x, None, 0.9, 0.05, 5, restarts=4, generator=generators[1]), None)
    assert (best >= one).all() and best.mean() > one.mean() + 0.05
    lowest = bumps(pgd(bumps, x, None, 0.9, 0.05, 5, restarts=4, targeted=True), None)
    assert lowest.mean() < bumps(x, None).mean()
    on_the_way = bumps(pgd(bumps, x, None, 0.9, 0.5, 3, keep_best=True, random_start=False), None)
    assert (on_the_way >= bumps(x, None)).all()
    with pytest.raises(ValueError, match="reduction='none'"):
        pgd(lambda x, y: bumps(x, y).sum(), x, None, 0.1, restarts=2)


# Errors ---------------------------------------------------------------------------------------------------


def single(*layers):
    """One logit for each sample, whose cross-entropy would move nothing."""
    return nn.Sequential(nn.Flatten(), nn.Linear(60, 1), *layers)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "FGM"),
        ({"x": torch.tensor(1.0)}, ValueError, "0-d"),
        ({"epsilon": -1}, ValueError, "epsilon must be finite and >= 0"),
        ({"epsilon": math.nan}, ValueError, "epsilon"),
        ({"epsilon": torch.ones(4)}, ValueError, r"\[6\]"),
        ({"epsilon": torch.full((6,), -1.0)}, ValueError, "epsilon"),
        ({"norm": 2}, ValueError, "norm must be one of"),
        ({"bounds": (1.0, 0.0)}, ValueError, "lower <= upper"),
        ({"bounds": (torch.zeros(2), torch.ones(2))}, ValueError, "broadcast"),
        ({"bounds": (0.0, 0.5)}, ValueError, "normalized"),
        ({"mode": "evaluate"}, ValueError, "mode must be one of"),
        ({"bounds": 1.0}, TypeError, r"\(lower, upper\) or None"),
        ({"bounds": (0.0, 0.5, 1.0)}, TypeError, r"\(lower, upper\) or None"),
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": True}, ValueError, "steps must be a whole number"),
        ({"restarts": True}, ValueError, "restarts must be a whole number"),
        *(({name: "no"}, TypeError, f"{name} must be True or False, got {name}='no'")
          for name in ("targeted", "steepest", "random_start", "keep_best")),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got 3"),
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, got 3"),
        ({"x": [0.5]}, TypeError, "x must be a tensor of a floating dtype, got <class 'list'>"),
        ({"steps": math.inf}, ValueError, "whole number"),
        ({"alpha": -1.0}, ValueError, "alpha"),
        ({"restart": 3}, TypeError, r"pgd\(\) got unknown option 'restart'; did you mean 'restarts'\?"),
        ({"restarts": 2, "random_start": False}, ValueError, "random start"),
        ({"model_or_loss": single()}, ValueError, "at least 2 classes, got shape \\(6, 1\\)"),
        ({"model_or_loss": single(nn.Flatten(0)), "y": torch.ones(6)}, ValueError, "at least 2 classes"),
        ({"model_or_loss": 3}, TypeError, "model that returns logits"),
        ({"model_or_loss": lambda x, y: 1.0}, TypeError, "tensor"),
        ({"model_or_loss": lambda x, y: x.detach().sum()}, ValueError, "does not depend on x"),
        ({"model_or_loss": lambda x, y: torch.ones((), requires_grad=True)}, ValueError, "depend on x"),
        ({"model_or_loss": lambda x, y: x.flatten()}, ValueError, r"\[6\]"),
    ],
)  # fmt: skip
def test_errors(model, x, y, options, error, message):
    arguments = {"model_or_loss": model, "x": x, "y": y, "epsilon": 0.1, **options}
    with pytest.raises(error, match=message):
        pgd(**arguments)


def test_errors_of_the_tutorials_function(x):
    for gradient in (None, x[:1]):
        with pytest.raises(ValueError, match="shape of the image"):
            fgsm_attack(x, 0.1, gradient)
    with pytest.raises(TypeError, match="logits"):
        fgsm(nn.LSTM(4, 4), x[0], torch.zeros(3).long(), 0.1)
