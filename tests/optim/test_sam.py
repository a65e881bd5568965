"""SAM and ASAM: closed forms, the steps that they come down to, and narrow weights."""

import math

import pytest
import torch
from torch.nn import Parameter

import fastreg
from fastreg import EMA, SAM, ClipNorm, GradientNoise

from .conftest import KINDS, double, equal, set_gradients, values, weights
from .sam_cases import BASES, CURVATURE, cycle, fixed_cycle, quadratic, same_state

# NumPy's, which runs Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


# Closed forms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, (0.564222912360, 1.795527864045)),
        ({"adaptive": True}, (0.571715728753, 1.785857864376)),
        ({"adaptive": True, "eta": 0.01}, (0.571362088067, 1.785822464954)),
    ],
    ids=("SAM", "ASAM", "ASAM, eta"),
)
def test_one_step_on_a_quadratic(backend, options, expected):
    """w - lr · g(w + ρ T² g / ‖T g‖) in float64."""
    w = double(1, 2)
    start = w.detach().clone()
    scale = start.abs() + options.get("eta", 0) if options else torch.ones(2, dtype=torch.float64)
    gradient = CURVATURE * start
    climbed = start + 0.1 * scale**2 * gradient / (scale * gradient).norm()
    optimizer = SAM([w], fastreg.SGD, rho=0.1, lr=0.1, **options)
    cycle(optimizer, lambda: quadratic(w))
    torch.testing.assert_close(w.detach(), start - 0.1 * CURVATURE * climbed, rtol=0, atol=1e-12)
    torch.testing.assert_close(w.detach(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(optimizer.perturbation_norm) == pytest.approx(float((scale * gradient).norm()), rel=1e-12)


@pytest.mark.parametrize(
    "curvature, lr, rho, expected", [(3.0, 0.2, 0.1, 0.042857142857), (1.0, 0.5, 0.05, 0.0166666667)]
)
def test_limit_cycle(backend, curvature, lr, rho, expected):
    """|w| → lr ρ λ / (2 - lr λ), with alternating sign  (Bartlett, Long, Bousquet 2022)."""
    w = double(1)
    optimizer = SAM([w], fastreg.SGD, rho=rho, lr=lr)
    for _ in range(40):
        before = w.item()
        cycle(optimizer, lambda: quadratic(w, curvature))
    radius = lr * rho * curvature / (2 - lr * curvature)
    assert abs(radius - expected) <= 1e-10
    assert abs(abs(w.item()) - radius) <= 1e-11 and w.item() * before < 0


def test_limit_cycle_of_the_largest_curvature():
    w, curvature = double(1, 1, 1), torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    optimizer = SAM([w], fastreg.SGD, rho=0.1, lr=0.2)
    for _ in range(400):
        cycle(optimizer, lambda: quadratic(w, curvature))
    expected = torch.tensor([0.3 * 0.2 / (2 - 0.6), 0, 0], dtype=torch.float64)
    torch.testing.assert_close(w.detach().abs(), expected, rtol=0, atol=1e-11)
    assert quadratic(w, curvature).item() == pytest.approx(0.0027551020408, abs=1e-11)


@pytest.mark.parametrize("adaptive", (False, True))
def test_ascent_of_a_linear_loss(backend, adaptive):
    """L(w + e) - L(w) = ρ ‖T a‖ and ‖e / T‖ = ρ, over several tensors."""
    params = [double(1.0, -2.0, 0.5), double(3.0)]
    slopes = [torch.tensor([0.3, 0.1, -2.0], dtype=torch.float64), torch.tensor([-1.5], dtype=torch.float64)]
    start, optimizer = values(params), SAM(params, fastreg.SGD, rho=0.25, adaptive=adaptive, lr=1.0)

    def loss():
        return sum((a * p).sum() for a, p in zip(slopes, params, strict=True))

    before = loss()
    before.backward()
    optimizer.first_step()
    scales = [w.abs() if adaptive else torch.ones_like(w) for w in start]
    expected = 0.25 * torch.cat([t * a for t, a in zip(scales, slopes, strict=True)]).norm()
    assert (loss() - before).item() == pytest.approx(float(expected), rel=1e-12)
    radius = torch.cat([(p.detach() - w) / t for p, w, t in zip(params, start, scales, strict=True)]).norm()
    assert float(radius) == pytest.approx(0.25, rel=1e-12)


def test_ascent_of_a_quadratic_loss():
    """ρ‖g‖ + ρ² gᵀHg / 2‖g‖²."""
    w = double(1, 2)
    optimizer = SAM([w], fastreg.SGD, rho=0.1, lr=1.0)
    before = quadratic(w)
    before.backward()
    optimizer.first_step()
    assert (quadratic(w) - before).item() == pytest.approx(0.464213595500, abs=1e-12)


@pytest.mark.parametrize("adaptive", (False, True))
def test_asam_does_not_feel_the_scale_of_layers(backend, adaptive):
    """(c W₁, W₂ / c) is the same ReLU network; powers of two scale without rounding, so that bits agree."""
    generator = torch.Generator().manual_seed(0)
    x, first, second = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((16, 4), (6, 4), (3, 6))
    )
    losses = []
    for scale in (1.0, 16.0, 2.0**-7):
        params = [Parameter(first * scale), Parameter(second / scale)]
        optimizer = SAM(params, fastreg.SGD, rho=0.5, adaptive=adaptive, lr=1.0)

        def loss(params=params):
            return ((x @ params[0].T).relu() @ params[1].T).square().mean()

        loss().backward()
        optimizer.first_step()
        losses.append(loss().item())
    assert (losses[0] == losses[1] == losses[2]) == adaptive


def test_the_scale_of_the_loss_does_not_matter(backend):
    """Bit for bit in float32: the first pass needs no unscaling."""
    perturbed = []
    for exponent in (-10, 0, 10, 16):
        params = weights()
        set_gradients(params, 1)
        for p in params:
            p.grad.mul_(2.0**exponent)
        SAM(params, fastreg.SGD, rho=0.05, lr=1.0).first_step()
        perturbed.append(values(params))
    assert all(equal(perturbed[0], other) for other in perturbed[1:])
    assert not any(map(torch.equal, perturbed[0], values(weights())))


def test_two_workers_that_share_the_perturbation():
    """Gradients averaged before the first step, where each for itself would perturb by its own."""
    curvatures = torch.tensor([[4.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    for shared, expected in ((True, (2.141421356, 2.070710678)), (False, (2.2, 2.1))):
        w = double(1, 2)
        start = w.detach().clone()
        optimizer = SAM([w], fastreg.SGD, rho=0.1, lr=1.0)
        for batch in [curvatures.mean(0)] if shared else curvatures:
            quadratic(w, batch).backward()
            optimizer.first_step(zero_grad=True)
            quadratic(w, batch / (1 if shared else 2)).backward()
            optimizer.accumulate()
        optimizer.step()
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(start - w.detach(), expected, rtol=0, atol=1e-9)


# What it comes down to -----------------------------------------------------------------------------------

REDUCED = {
    "adamw": (fastreg.AdamW, {}),
    "momentum": (fastreg.SGD, {"momentum": 0.9}),
    "amsgrad": (fastreg.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "lion": (fastreg.Lion, {"weight_decay": 0.1}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REDUCED)
def test_a_rho_of_0_is_the_base_optimizer(name, kind):
    (make, options), (dtype, rounding) = REDUCED[name], KINDS[kind]
    ours, theirs = weights(dtype), weights(dtype)
    optimizer = SAM(ours, make, rho=0.0, lr=0.01, **options, **rounding)
    plain = make(theirs, lr=0.01, **options, **rounding)
    for seed in range(5):
        fixed_cycle(optimizer, ours, seed)
        set_gradients(theirs, seed)
        plain.step()
    assert equal(values(ours), values(theirs)) and same_state(optimizer, plain)


@pytest.mark.parametrize("adaptive", (False, True))
@pytest.mark.parametrize("name", [*REDUCED, "torch", "torch momentum"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_steps_by_the_second_gradients(name, kind, adaptive):
    """From the weights as they were, bit for bit, whatever they have been perturbed to meanwhile."""
    make, options = {**REDUCED, **BASES}[name]
    dtype, rounding = KINDS[kind]
    options = {"lr": 0.01, **options, **({} if name.startswith("torch") else rounding)}
    ours, theirs = weights(dtype), weights(dtype)
    optimizer = SAM(ours, make, rho=0.5, adaptive=adaptive, eta=0.01, **options)
    plain = make(theirs, **options)
    for seed in range(5):
        fixed_cycle(optimizer, ours, seed)
        set_gradients(theirs, seed)
        plain.step()
    assert equal(values(ours), values(theirs)) and same_state(optimizer, plain)


def test_every_backend_steps_from_the_backup(backend, same):
    """In the optimizer's own pass."""
    ours, theirs = weights(), weights()
    options = {"lr": 0.01, "regularizers": [ClipNorm(math.inf)]}
    optimizer, plain = SAM(ours, fastreg.AdamW, rho=0.5, **options), fastreg.AdamW(theirs, **options)
    for seed in range(3):
        fixed_cycle(optimizer, ours, seed, seed)
        set_gradients(theirs, seed, seed)
        plain.step()
    assert all(map(same, values(ours), values(theirs)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "components",
    [
        lambda: [ClipNorm(0.7), GradientNoise(0.1, relative=True), fastreg.L1(0.1)],
        lambda: [ClipNorm(0.7), EMA(0.9, start=1), GradientNoise(0.1)],
        lambda: [EMA(0.9)],
        lambda: [fastreg.L2SP(0.1)],
        lambda: [fastreg.SlowWeights(2)],
    ],
    ids=("clip, noise and L1", "clip, average and noise", "EMA", "L2-SP", "Lookahead"),
)
def test_with_regularizers(components, kind):
    """What clips, adds noise, pulls and averages sees the second gradients and the weights themselves."""
    dtype, rounding = KINDS[kind]
    ours, theirs = weights(dtype), weights(dtype)
    optimizer = SAM(ours, fastreg.AdamW, rho=0.5, lr=0.01, seed=3, regularizers=components(), **rounding)
    plain = fastreg.AdamW(theirs, lr=0.01, seed=3, regularizers=components(), **rounding)
    for seed in range(4):
        fixed_cycle(optimizer, ours, seed)
        set_gradients(theirs, seed)
        plain.step()
        assert (optimizer.grad_norm is None) or torch.equal(optimizer.grad_norm, plain.grad_norm)
    assert equal(values(ours), values(theirs)) and same_state(optimizer, plain)


def test_no_averages_of_perturbed_weights():
    params = weights()
    optimizer = SAM(params, fastreg.AdamW, rho=0.5, regularizers=[EMA(0.5)])
    fixed_cycle(optimizer, params, 0)
    set_gradients(params, 1)
    optimizer.first_step()
    for name in ("eval", "averaged"):
        with pytest.raises(RuntimeError, match=rf"{name}\(\) between first_step\(\) and second_step"):
            getattr(optimizer, name)()
    optimizer.restore()
    optimizer.eval()
    shown = values(params)
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\) first"):
        optimizer.first_step()
    assert equal(values(params), shown)
    optimizer.train()
    optimizer.first_step()
    assert not any(map(torch.equal, values(params), shown))


def test_averages_of_the_base_are_reached():
    params = weights()
    optimizer = SAM(params, fastreg.AdamW, rho=0.5, regularizers=[EMA(0.5)])
    for seed in range(3):
        fixed_cycle(optimizer, params, seed)
    trained, average = values(params), [optimizer.state[p]["ema"].clone() for p in params]
    with optimizer.averaged():
        assert equal(values(params), average) and not equal(average, trained)
    optimizer.eval()
    assert equal(values(params), average)
    optimizer.train()
    assert equal(values(params), trained)


# Narrow weights ------------------------------------------------------------------------------------------


def realised(rounding, **options):
    """How far 10 M bfloat16 weights go along the gradient, and across it, in units of ρ."""
    generator = torch.Generator().manual_seed(0)
    p = Parameter(torch.empty(10_000_000, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator))
    p.grad = torch.empty_like(p).normal_(generator=generator)
    start, direction = p.detach().double(), p.grad.double() / p.grad.double().norm()
    SAM([p], fastreg.SGD, rho=0.05, lr=0.1, rounding=rounding, **options).first_step()
    moved = p.detach().double() - start
    along = float(moved @ direction)
    return along / 0.05, float((moved - along * direction).norm()) / 0.05


@pytest.mark.slow
def test_perturbations_of_narrow_weights_are_real():
    """As far as SAM's docstring says."""
    for options in ({}, {"bf16": "remainder"}):
        along, across = realised("stochastic", **options)
        assert 0.99 <= along <= 1.01 and 1.85 <= across <= 1.95
    along, _ = realised("nearest")
    assert 0.42 <= along <= 0.44
