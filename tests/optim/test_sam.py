"""SAM and ASAM: closed forms, exact restoration, every way in which a pass can go wrong, checkpoints."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch.nn import Parameter

import fastreg
from fastreg import EMA, SAM, ClipNorm, GradientNoise

# NumPy's, which runs Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

SHAPES = [(33,), (4, 5), ()]
BASES = {
    "fastreg": (fastreg.AdamW, {"lr": 0.1}),
    "fastreg momentum": (fastreg.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "torch": (torch.optim.AdamW, {"lr": 0.1}),
    "torch momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
}
KINDS = {
    "float32": (torch.float32, {}),
    "stochastic": (torch.bfloat16, {"bf16": "stochastic"}),
    "remainder": (torch.bfloat16, {"bf16": "remainder"}),
}


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]


def double(*values):
    return Parameter(torch.tensor(values, dtype=torch.float64))


def weights(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give(params, seed, *without):
    """Gradients that are the same for all who ask with the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if i in without else gradient


def values(params):
    return [p.detach().clone() for p in params]


def equal(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def cycle(optimizer, loss):
    """Both passes and the step, by a function that returns the loss."""
    optimizer.zero_grad()
    loss().backward()
    optimizer.first_step(zero_grad=True)
    loss().backward()
    optimizer.second_step(zero_grad=True)


def given_cycle(optimizer, params, seed, *without):
    """The same with gradients that do not depend on the weights: what is stepped by are those of `seed`."""
    give(params, 1000 + seed)
    optimizer.first_step()
    give(params, seed, *without)
    optimizer.second_step()


def same_state(a, b):
    states = a.state_dict()["state"], b.state_dict()["state"]
    ignored = ("step", "sam_count")
    names = [
        {i: {n for n in s[i] if n not in ignored} for i in s if s[i].keys() - set(ignored)} for s in states
    ]
    return names[0] == names[1] and all(
        torch.equal(states[0][i][n], states[1][i][n]) for i in names[0] for n in names[0][i]
    )


# Closed forms --------------------------------------------------------------------------------------------

CURVATURE = torch.tensor([4.0, 1.0], dtype=torch.float64)


def quadratic(w, curvature=CURVATURE):
    return 0.5 * (curvature * w * w).sum()


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
        give(params, 1)
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
        given_cycle(optimizer, ours, seed)
        give(theirs, seed)
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
        given_cycle(optimizer, ours, seed)
        give(theirs, seed)
        plain.step()
    assert equal(values(ours), values(theirs)) and same_state(optimizer, plain)


def test_every_backend_steps_from_the_backup(backend, same):
    """In the optimizer's own pass."""
    ours, theirs = weights(), weights()
    options = {"lr": 0.01, "regularizers": [ClipNorm(math.inf)]}
    optimizer, plain = SAM(ours, fastreg.AdamW, rho=0.5, **options), fastreg.AdamW(theirs, **options)
    for seed in range(3):
        given_cycle(optimizer, ours, seed, seed)
        give(theirs, seed, seed)
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
        given_cycle(optimizer, ours, seed)
        give(theirs, seed)
        plain.step()
        assert (optimizer.grad_norm is None) or torch.equal(optimizer.grad_norm, plain.grad_norm)
    assert equal(values(ours), values(theirs)) and same_state(optimizer, plain)


def test_no_averages_of_perturbed_weights():
    params = weights()
    optimizer = SAM(params, fastreg.AdamW, rho=0.5, regularizers=[EMA(0.5)])
    given_cycle(optimizer, params, 0)
    give(params, 1)
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
        given_cycle(optimizer, params, seed)
    trained, average = values(params), [optimizer.state[p]["ema"].clone() for p in params]
    with optimizer.averaged():
        assert equal(values(params), average) and not equal(average, trained)
    optimizer.eval()
    assert equal(values(params), average)
    optimizer.train()
    assert equal(values(params), trained)


# Restoration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, kind",
    [
        ("fastreg", "float32"), ("fastreg momentum", "float32"), ("fastreg", "stochastic"),
        ("fastreg", "remainder"), ("torch", "float32"), ("torch momentum", "stochastic"),
    ],
)  # fmt: skip
def test_1000_cycles_without_a_step_leave_every_bit(name, kind):
    (make, options), (dtype, rounding) = BASES[name], KINDS[kind]
    params, expected = weights(dtype), values(weights(dtype))
    if name.startswith("fastreg"):
        options = options | rounding
    optimizer = SAM(params, make, rho=0.5, **options | {"lr": 0.0, "weight_decay": 0.0})
    addresses = [p.data_ptr() for p in params]
    give(params, 0)
    for turn in range(1000):
        optimizer.first_step()
        if turn % 100 == 0:
            assert not any(map(torch.equal, values(params)[:2], expected[:2]))
            assert [p.data_ptr() for p in params] == addresses
            for p in params:
                p.grad = p.grad.roll(1) if p.dim() == 1 else p.grad
        optimizer.second_step()
    assert equal(values(params), expected) and [p.data_ptr() for p in params] == addresses


@pytest.mark.parametrize("first", ((), (0,), (0, 1, 2)), ids=str)
@pytest.mark.parametrize("second", ((), (0,), (1,), (0, 1, 2)), ids=str)
def test_gradients_that_are_missing(base, first, second):
    """In either pass: who has none in the first is not perturbed, who has none in the second is restored."""
    make, options = base
    ours, theirs = weights(), weights()
    optimizer, plain = SAM(ours, make, rho=0.5, **options), make(theirs, **options)
    for turn in range(3):
        before = values(ours)
        give(ours, 10 + turn, *first)
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in ours if p.grad is not None))
        optimizer.first_step()
        for p, w in zip(ours, before, strict=True):
            expected = w if p.grad is None else w + 0.5 * p.grad / norm
            torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-6)
            assert torch.equal(p.detach(), w) == (p.grad is None)
        give(ours, turn, *second), give(theirs, turn, *second)
        optimizer.second_step(), plain.step()
        assert equal(values(ours), values(theirs))


@pytest.mark.parametrize("bad", (math.inf, -math.inf, math.nan, 0.0), ids=str)
@pytest.mark.parametrize(
    "name, backend",
    [("fastreg", "reference"), ("fastreg", "compiled"), ("fastreg", "triton"), ("torch", "reference")],
)
def test_first_gradients_without_a_direction(name, backend, bad, same):
    """Perturb nothing; the step is taken by the second ones."""
    make, options = BASES[name]
    ours, theirs = weights(), weights()
    optimizer, plain = SAM(ours, make, rho=0.5, **options), make(theirs, **options)
    give(ours, 1)
    for p in ours:
        if bad == 0:
            p.grad.zero_()
        elif p.dim() == 1:
            p.grad[7] = bad
    with fastreg.use_backend(backend):
        optimizer.first_step()
        assert equal(values(ours), values(theirs)) and optimizer.perturbed
        give(ours, 2), give(theirs, 2)
        optimizer.second_step(), plain.step()
    assert all(map(same, values(ours), values(theirs)))


def test_a_first_step_after_a_second_one_was_left_out(base):
    """The iteration is given up: weights come back, then are perturbed anew."""
    make, options = base
    params, others = weights(), weights()
    optimizer, other = SAM(params, make, rho=0.5, **options), SAM(others, make, rho=0.5, **options)
    give(params, 1)
    optimizer.first_step()
    give(params, 2), give(others, 2)
    optimizer.first_step(), other.first_step()
    assert equal(values(params), values(others))
    optimizer.restore()
    assert equal(values(params), values(weights())) and not optimizer.perturbed


@pytest.mark.parametrize("error", (ValueError, KeyboardInterrupt))
def test_a_closure_that_raises(base, error):
    make, options = base
    params = weights()
    optimizer = SAM(params, make, rho=0.5, **options)
    give(params, 1)

    def closure():
        assert not equal(values(params), values(weights()))
        raise error

    with pytest.raises(error):
        optimizer.step(closure)
    assert equal(values(params), values(weights())) and not optimizer.perturbed
    given_cycle(optimizer, params, 2)
    assert not equal(values(params), values(weights()))


def test_a_step_that_is_refused_leaves_the_weights_as_they_were():
    params = weights()
    optimizer = SAM(params, fastreg.AdamW, rho=0.5, nonfinite="raise")
    give(params, 1)
    optimizer.first_step()
    give(params, 2)
    params[0].grad[3] = math.nan
    optimizer.second_step()
    assert equal(values(params), values(weights()))  # skipped; the next step tells
    give(params, 3)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.second_step()
    assert equal(values(params), values(weights())) and not optimizer.perturbed


def test_evaluation_before_a_step_is_begun_anew():
    ours, theirs = weights(), weights()
    optimizer, other = (SAM(p, fastreg.AdamW, rho=0.5, regularizers=[EMA(0.5)]) for p in (ours, theirs))
    for seed in range(3):
        give(ours, 10 + seed)
        optimizer.first_step()
        optimizer.restore()
        optimizer.eval()
        assert seed == 0 or not equal(values(ours), values(theirs))
        optimizer.train()
        given_cycle(optimizer, ours, seed)
        given_cycle(other, theirs, seed)
    assert equal(values(ours), values(theirs))


# The interface -------------------------------------------------------------------------------------------


def test_schedulers_do_not_warn(base):
    """Warnings are errors here: torch would miss `optimizer.step()` in a loop of first and second steps."""
    make, options = base
    params = weights()
    optimizer = SAM(params, make, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for seed in range(3):
        given_cycle(optimizer, params, seed)
        scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.1 / 8


def test_step_is_the_second_step_while_perturbed(base):
    make, options = base
    ours, theirs = weights(), weights()
    optimizer, other = SAM(ours, make, rho=0.5, **options), SAM(theirs, make, rho=0.5, **options)
    for seed in range(2):
        give(ours, 10 + seed)
        optimizer.first_step()
        give(ours, seed)
        assert optimizer.step() is None
        given_cycle(other, theirs, seed)
    assert equal(values(ours), values(theirs)) and same_state(optimizer, other)


def test_out_of_order():
    params = weights()
    optimizer = SAM(params, fastreg.AdamW)
    give(params, 0)
    with pytest.raises(RuntimeError, match=r"call first_step\(\) after the first backward pass"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"second_step\(\) comes after first_step"):
        optimizer.second_step()
    with pytest.raises(RuntimeError, match=r"accumulate\(\) comes after first_step"):
        optimizer.accumulate()
    assert equal(values(params), values(weights()))
    given_cycle(optimizer, params, 0)
    with pytest.raises(RuntimeError, match="comes after first_step"):
        optimizer.second_step()


@pytest.mark.parametrize("convention", ("second", "second, no gradients", "both", "perturbed already"))
def test_closures(base, convention):
    """Each way of calling equals the two steps, and returns the first loss that it has seen."""
    make, options = base
    ours, theirs = double(1, 2), double(1, 2)
    optimizer = SAM(
        [ours],
        make,
        rho=0.1,
        closure=convention.split(",")[0].split(" ")[0].replace("perturbed", "second"),
        **options,
    )
    other = SAM([theirs], make, rho=0.1, **options)
    losses = []

    def closure():
        optimizer.zero_grad()
        losses.append(quadratic(ours))
        losses[-1].backward()
        return losses[-1]

    for _ in range(3):
        optimizer.zero_grad()
        if convention in ("second", "perturbed already"):
            quadratic(ours).backward()
        if convention == "perturbed already":
            optimizer.first_step(zero_grad=True)
        losses.clear()
        found = optimizer.step(closure)
        assert len(losses) == (1 if convention in ("second", "perturbed already") else 2)
        assert found is losses[0]
        cycle(other, lambda: quadratic(theirs))
        assert torch.equal(ours, theirs)


def test_closures_when_not_due():
    w, calls = double(1, 2), []
    for convention in ("second", "both"):
        optimizer = SAM([w], fastreg.SGD, lr=0.1, interval=2, start_step=1, closure=convention)
        w.grad = None

        def closure(optimizer=optimizer):
            optimizer.zero_grad()
            calls.append(quadratic(w))
            calls[-1].backward()
            return calls[-1]

        for expected in (1, 2, 1):
            optimizer.zero_grad()
            calls.clear()
            before = w.detach().clone()
            assert optimizer.step(closure) is calls[0] and len(calls) == expected
            if expected == 1:
                torch.testing.assert_close(w.detach(), before - 0.1 * CURVATURE * before, rtol=0, atol=1e-12)


def test_interval_and_start(base):
    """Steps that are not due are the base's alone."""
    make, options = base
    ours, theirs = double(1, 2), double(1, 2)
    optimizer = SAM([ours], make, rho=0.1, interval=3, start_step=2, **options)
    other = SAM([theirs], make, rho=0.1, **options)
    due = []
    for turn in range(9):
        due.append(optimizer.due)
        optimizer.zero_grad()
        quadratic(ours).backward()
        if optimizer.due:
            optimizer.first_step(zero_grad=True)
            quadratic(ours).backward()
        optimizer.step()
        other.param_groups[0]["rho"] = 0.1 if turn in (2, 5, 8) else 0.0
        cycle(other, lambda: quadratic(theirs))
    assert due == [turn in (2, 5, 8) for turn in range(9)]
    assert torch.equal(ours, theirs)


def test_both_steps_when_not_due():
    """A loop that does not ask makes both passes at the weights themselves."""
    ours, theirs = double(1, 2), double(1, 2)
    optimizer = SAM([ours], fastreg.SGD, rho=0.1, lr=0.1, interval=2, start_step=1)
    plain = fastreg.SGD([theirs], lr=0.1)
    cycle(optimizer, lambda: quadratic(ours))
    quadratic(theirs).backward()
    plain.step()
    assert torch.equal(ours, theirs)
    cycle(optimizer, lambda: quadratic(ours))
    plain.step()
    assert not torch.equal(ours, theirs)


def test_rho_of_groups_and_of_a_schedule(base):
    make, options = base
    params = weights()
    groups = [{"params": params[:1], "rho": 0.0}, {"params": params[1:2], "rho": 0.3}, {"params": params[2:]}]
    optimizer = SAM(groups, make, rho=0.7, **options)
    start = values(params)
    give(params, 1)
    for factor in (1.0, 0.5):
        for group in optimizer.param_groups[1:]:
            group["rho"] *= factor
        optimizer.first_step()
        assert torch.equal(params[0].detach(), start[0])
        # The norm is that of what is perturbed.
        norm = torch.cat([p.grad.flatten() for p in params[1:]]).norm()
        for p, w, rho in zip(params[1:], start[1:], (0.3, 0.7), strict=True):
            torch.testing.assert_close(p.detach(), w + factor * rho * p.grad / norm, rtol=1e-6, atol=1e-6)
        held = optimizer.state_dict()["state"]
        assert ["sam_backup" in held.get(i, {}) for i in range(3)] == [False, True, True]
        optimizer.restore()
        assert equal(values(params), start)
    assert not any("sam_backup" in optimizer.state.get(p, {}) for p in params)


def test_adaptive_by_group():
    """All share one norm: that of T g with T = |w| + η or 1."""
    params = weights()
    groups = [{"params": params[:1], "adaptive": True, "eta": 0.1}, {"params": params[1:]}]
    optimizer = SAM(groups, fastreg.SGD, rho=0.4, lr=0.1)
    start = values(params)
    give(params, 1)
    scales = [start[0].abs() + 0.1, *map(torch.ones_like, start[1:])]
    norm = torch.cat([(t * p.grad).flatten() for t, p in zip(scales, params, strict=True)]).norm()
    optimizer.first_step()
    for p, w, t in zip(params, start, scales, strict=True):
        torch.testing.assert_close(p.detach(), w + 0.4 * t * t * p.grad / norm, rtol=1e-6, atol=1e-6)
    optimizer.param_groups[0]["rho"] = 0.0  # nothing adaptive is perturbed now
    optimizer.first_step()
    norm = torch.cat([p.grad.flatten() for p in params[1:]]).norm()
    torch.testing.assert_close(
        params[1].detach(), start[1] + 0.4 * params[1].grad / norm, rtol=1e-6, atol=1e-6
    )


def test_frozen_parameters(base):
    make, options = base
    params = weights()
    params[1].requires_grad_(False)
    optimizer = SAM(params, make, **options)
    cycle(optimizer, lambda: sum((p * p).sum() for p in params))
    assert torch.equal(params[1], weights()[1]) and not torch.equal(params[0], weights()[0])


@pytest.mark.parametrize("perturbed", (False, True))
def test_groups_that_are_added(base, perturbed):
    """Also between the passes: what is new is not perturbed then, but stepped."""
    make, options = base
    ours, theirs = weights(), weights()
    optimizer, plain = SAM(ours[:1], make, rho=0.5, **options), make(theirs, **options)
    give(ours, 5)
    if perturbed:
        optimizer.first_step()
    optimizer.add_param_group({"params": ours[1:], "rho": 0.25})
    if not perturbed:
        optimizer.first_step()
    for p, w in zip(ours[1:], weights()[1:], strict=True):
        assert torch.equal(p, w) == perturbed
    for seed in range(2):
        give(ours, seed), give(theirs, seed)
        optimizer.second_step(), plain.step()
        assert equal(values(ours), values(theirs))
        give(ours, 10)
        optimizer.first_step()
    assert [group["rho"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert all(group["perturbed"] and group["sam_step"] == 2 for group in optimizer.param_groups)


def test_named_parameters():
    model = torch.nn.Linear(3, 2)
    optimizer = SAM(model.named_parameters(), fastreg.AdamW)
    cycle(optimizer, lambda: model(torch.ones(1, 3)).square().sum())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize(
    "how", (copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))), ids=("copy", "pickle")
)
@pytest.mark.parametrize("perturbed", (False, True))
def test_copies(base, how, perturbed):
    """Taken together with the parameters, also between the passes, and also under a scheduler."""
    make, options = base
    params = weights()
    optimizer = SAM(params, make, rho=0.5, interval=2, **options)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    given_cycle(optimizer, params, 1)
    give(params, 2)
    optimizer.step()
    if perturbed:
        give(params, 3)
        optimizer.first_step()
    twin, twins = how((optimizer, params))
    assert twin.param_groups[0]["params"][0] is twins[0] and twins[0] is not params[0]
    for o, own in ((optimizer, params), (twin, twins)):
        if not perturbed:
            give(own, 3)
            o.first_step()
        give(own, 4)
        o.second_step()
        give(own, 5)
        o.step()
        given_cycle(o, own, 6)
    assert equal(values(params), values(twins)) and same_state(optimizer, twin)
    assert not twin.due and twin.interval == 2


def test_refusals():
    params = weights()
    with pytest.raises(TypeError, match="(?s)base_optimizer must be a class.*SAM.*AdamW, lr"):
        SAM(params, fastreg.AdamW(params))
    with pytest.raises(TypeError, match="base_optimizer must be a class"):
        SAM(params, "AdamW")
    for options, message in (
        ({"rho": -0.1}, "rho must be finite and >= 0, got rho=-0.1"),
        ({"rho": math.nan}, "rho"),
        ({"rho": math.inf}, "rho"),
        ({"eta": -1.0}, "eta must be"),
        ({"interval": 0}, "interval must be a whole number >= 1"),
        ({"start_step": -1}, "start_step must be"),
        ({"closure": "first"}, "closure must be one of 'second', 'both'"),
        ({"rounding": "up"}, "rounding must be one of 'stochastic', 'nearest', got 'up'"),
    ):
        with pytest.raises(ValueError, match=message):
            SAM(params, fastreg.AdamW, **options)
    with pytest.raises(ValueError, match="rho must be"):
        SAM([{"params": params, "rho": -1.0}], fastreg.AdamW)
    optimizer = SAM(params[:1], fastreg.AdamW)
    with pytest.raises(ValueError, match="rho must be"):
        optimizer.add_param_group({"params": params[1:], "rho": -1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("way", ("second_step", "step", "closure"))
def test_hooks_run_once_a_step(base, way):
    make, options = base
    params, calls = weights(), []
    optimizer = SAM(params, make, **options)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    give(params, 1)
    if way == "closure":
        optimizer.step(lambda: give(params, 2))
    else:
        optimizer.first_step()
        assert calls == []
        give(params, 2)
        getattr(optimizer, way)()
    assert calls == ["before", "after"]


def test_what_the_base_optimizer_offers():
    params = weights()
    optimizer = SAM(params, fastreg.AdamW, regularizers=[ClipNorm(1.0)])
    assert optimizer.grad_norm is None and optimizer.perturbation_norm is None
    given_cycle(optimizer, params, 1)
    exact = torch.cat([p.grad.double().flatten() for p in params]).norm()
    assert float(optimizer.grad_norm) == pytest.approx(float(exact), rel=1e-6)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        optimizer.nonsense  # noqa: B018
    assert optimizer.state is optimizer.base_optimizer.state
    assert optimizer.defaults is optimizer.base_optimizer.defaults
    assert not hasattr(SAM(weights(), torch.optim.SGD, lr=0.1), "averaged")


# Accumulation --------------------------------------------------------------------------------------------


def problem(dtype=torch.float64):
    """Weights, batches and the loss of one."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((8, 5), (8, 3)))
    params = [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((5, 3), (3,))]

    def loss(part=slice(None)):
        matrix, bias = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in params)
        return ((x[part].to(matrix.dtype) @ matrix + bias).tanh() - y[part].to(matrix.dtype)).square().mean()

    return params, loss


PARTS = (slice(0, 4), slice(4, 8))


def test_micro_batches_with_perturbations_of_their_own(base):
    """The step is by the mean of their gradients, worked out by hand."""
    make, options = base
    params, loss = problem()
    optimizer = SAM(params, make, rho=0.5, **options)
    mirror, other = problem()
    plain = make(mirror, **options)
    for _ in range(3):
        sums = [torch.zeros_like(p) for p in mirror]
        for part in PARTS:
            gradients = torch.autograd.grad(other(part), mirror)
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            start = values(mirror)
            with torch.no_grad():
                for p, g in zip(mirror, gradients, strict=True):
                    p.add_(0.5 * g / (norm + 1e-12))
            for total, g in zip(sums, torch.autograd.grad(other(part) / 2, mirror), strict=True):
                total += g
            with torch.no_grad():
                for p, w in zip(mirror, start, strict=True):
                    p.copy_(w)
        for p, g in zip(mirror, sums, strict=True):
            p.grad = g
        plain.step()

        for part in PARTS:
            loss(part).backward()
            optimizer.first_step(zero_grad=True)
            (loss(part) / 2).backward()
            optimizer.accumulate()
            assert all(p.grad is None for p in params) and not optimizer.perturbed
        optimizer.step()
        optimizer.zero_grad()
        for p, q in zip(params, mirror, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-12)


def test_the_last_micro_batch_may_go_with_the_step():
    results = []
    for last in (True, False):
        params, loss = problem()
        optimizer = SAM(params, fastreg.AdamW, rho=0.5, lr=0.1)
        for i, part in enumerate(PARTS):
            loss(part).backward()
            optimizer.first_step(zero_grad=True)
            loss(part).backward()
            if i == 0 or last:
                optimizer.accumulate()
        optimizer.step()
        results.append(values(params))
    assert equal(*results)


def test_gradients_that_are_views_are_kept():
    """Into a bucket, as DistributedDataParallel makes them, which the next backward pass writes again."""
    params = [double(0.0, 0.0, 0.0)]
    optimizer, bucket = SAM(params, fastreg.SGD, rho=0.1, lr=1.0), torch.zeros(5, dtype=torch.float64)
    for value in (1.0, 2.0):
        params[0].grad = bucket[1:4].fill_(value)
        optimizer.first_step()
        optimizer.accumulate()
    optimizer.step()
    assert params[0].tolist() == [-3.0] * 3


@pytest.mark.parametrize("name", ("fastreg", "torch"))
def test_both_passes_accumulated_are_the_whole_batch(name):
    make, options = BASES[name]
    results = []
    for parts in (PARTS, (slice(None),)):
        params, loss = problem()
        optimizer = SAM(params, make, rho=0.5, **options)
        for _ in range(3):
            optimizer.zero_grad()
            for part in parts:
                (loss(part) / len(parts)).backward()
            optimizer.first_step(zero_grad=True)
            for part in parts:
                (loss(part) / len(parts)).backward()
            optimizer.second_step()
        results.append(values(params))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# Loss scaling --------------------------------------------------------------------------------------------

SCALED = {
    **BASES,
    "clip": (fastreg.AdamW, {"lr": 0.1, "regularizers": [ClipNorm(0.1)]}),
    "fused": (fastreg.AdamW, {"lr": 0.1, "fused": True}),
    "torch fused": (torch.optim.AdamW, {"lr": 0.1, "fused": True}),
}


def scaled_cycle(optimizer, scaler, params, loss, bad=None):
    """One iteration; `bad` is the pass whose gradients overflow."""
    optimizer.zero_grad()
    for number in (1, 2):
        scaler.scale(loss()).backward()
        if bad == number:
            params[0].grad[2, 1] = math.inf
        if number == 1:
            optimizer.first_step(zero_grad=True)
    scaler.step(optimizer)
    scaler.update()


def snapshot(optimizer, params):
    state = optimizer.state_dict()["state"]
    return values(params), {
        (i, name): value.clone() for i in state for name, value in state[i].items() if name != "sam_count"
    }


@pytest.mark.parametrize("bad", (None, 1, 2))
@pytest.mark.parametrize("name", SCALED)
def test_under_a_scaler(name, bad):
    """A bad iteration leaves no trace but the smaller scale; without one, the run is the unscaled one."""
    make, options = SCALED[name]
    params, loss = problem(torch.float32)
    optimizer = SAM(params, make, rho=0.5, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    for turn in range(5):
        before = snapshot(optimizer, params)
        scaled_cycle(optimizer, scaler, params, loss, bad if turn == 2 else None)
        after = snapshot(optimizer, params)
        assert not optimizer.perturbed
        if bad and turn == 2:
            assert equal(before[0], after[0]) and before[1].keys() == after[1].keys()
            assert all(torch.equal(value, after[1][key]) for key, value in before[1].items())
        else:
            assert not equal(before[0], after[0])
    assert scaler.get_scale() == (2.0**7 if bad else 2.0**8)

    mirror, other = problem(torch.float32)
    plain = SAM(mirror, make, rho=0.5, **options)
    for _ in range(4 if bad else 5):
        cycle(plain, other)
    assert equal(values(params), values(mirror)) and same_state(optimizer, plain)


@pytest.mark.parametrize("bad", (1, 2))
@pytest.mark.parametrize("name", ("fastreg", "torch"))
def test_a_bad_first_iteration_under_a_scaler(name, bad):
    """Where the optimizer has no state yet."""
    make, options = BASES[name]
    params, loss = problem(torch.float32)
    start, optimizer = values(params), SAM(params, make, rho=0.5, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaled_cycle(optimizer, scaler, params, loss, bad)
    assert equal(values(params), start) and scaler.get_scale() == 2.0**7
    mirror, other = problem(torch.float32)
    plain = SAM(mirror, make, rho=0.5, **options)
    scaled_cycle(optimizer, scaler, params, loss)
    cycle(plain, other)
    assert equal(values(params), values(mirror))


@pytest.mark.parametrize("name", ("fastreg", "clip", "torch"))
def test_unscaled_by_the_user_before_the_step(name):
    make, options = SCALED[name]
    params, loss = problem(torch.float32)
    optimizer = SAM(params, make, rho=0.5, **options)
    mirror, other = problem(torch.float32)
    plain = SAM(mirror, make, rho=0.5, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(loss()).backward()
        optimizer.first_step(zero_grad=True)
        scaler.scale(loss()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        cycle(plain, other)
    assert equal(values(params), values(mirror))


@pytest.mark.parametrize("name", ("fastreg", "clip", "torch"))
def test_micro_batches_under_a_scaler(name):
    make, options = SCALED[name]
    results = []
    for scale in (2.0**8, None):
        params, loss = problem(torch.float32)
        optimizer = SAM(params, make, rho=0.5, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for _ in range(3):
            for part in PARTS:
                scaler.scale(loss(part)).backward()
                optimizer.first_step(zero_grad=True)
                scaler.scale(loss(part)).backward()
                optimizer.accumulate()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append(values(params))
    assert equal(*results)


@pytest.mark.parametrize("name", ("fastreg", "torch"))
def test_unscaling_what_is_not_there(name):
    """`unscale_` does not see what has been accumulated."""
    make, options = BASES[name]
    params, loss = problem(torch.float32)
    optimizer, scaler = SAM(params, make, **options), torch.amp.GradScaler("cpu")
    scaler.scale(loss()).backward()
    optimizer.first_step(zero_grad=True)
    scaler.scale(loss()).backward()
    optimizer.accumulate()
    before = values(params)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"does not see the gradients that accumulate\(\) keeps"):
        scaler.step(optimizer)
    assert equal(values(params), before)


def test_steps_that_are_not_due_under_a_scaler():
    """One pass, then the scaler's step."""
    params, loss = problem(torch.float32)
    mirror, other = problem(torch.float32)
    optimizer = SAM(params, torch.optim.AdamW, lr=0.1, start_step=5)
    plain, scaler = torch.optim.AdamW(mirror, lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaler.scale(loss()).backward()
    scaler.step(optimizer)
    scaler.update()
    other().backward()
    plain.step()
    assert equal(values(params), values(mirror))


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


def test_perturbations_of_narrow_weights_are_real():
    """As far as SAM's docstring says."""
    for options in ({}, {"bf16": "remainder"}):
        along, across = realised("stochastic", **options)
        assert 0.99 <= along <= 1.01 and 1.85 <= across <= 1.95
    along, _ = realised("nearest")
    assert 0.42 <= along <= 0.44


# Checkpoints ---------------------------------------------------------------------------------------------


def saved(*what):
    """Through a file, as safely as torch loads."""
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


RESUMED = [
    ("fastreg", "float32"), ("fastreg", "stochastic"), ("fastreg", "remainder"),
    ("fastreg momentum", "remainder"), ("torch", "float32"), ("torch momentum", "stochastic"),
]  # fmt: skip


@pytest.mark.parametrize("interval", (1, 3))
@pytest.mark.parametrize("name, kind", RESUMED)
@pytest.mark.parametrize("where", ("between steps", "between passes"))
def test_resumes_bit_for_bit(name, kind, where, interval):
    (make, options), (dtype, rounding) = BASES[name], KINDS[kind]
    if name.startswith("fastreg"):
        options = options | rounding

    def made():
        params, loss = problem(dtype)
        return params, loss, SAM(params, make, rho=0.5, interval=interval, **options)

    def first(optimizer, loss):
        optimizer.zero_grad()
        loss().backward()
        if optimizer.due:
            optimizer.first_step(zero_grad=True)
            loss().backward()

    params, loss, optimizer = made()
    for _ in range(4):
        first(optimizer, loss)
        optimizer.step()
    if where == "between passes":
        optimizer.zero_grad()
        while not optimizer.due:
            first(optimizer, loss)
            optimizer.step()
        loss().backward()
        optimizer.first_step()
    weights, state = saved(values(params), optimizer.state_dict())

    others, other_loss, other = made()
    given_cycle(other, others, 3)  # what it holds before is forgotten
    with torch.no_grad():
        for p, w in zip(others, weights, strict=True):
            p.copy_(w)
    other.load_state_dict(state)
    assert other.perturbed == (where == "between passes")
    for o, own in ((optimizer, loss), (other, other_loss)):
        if where == "between passes":
            o.zero_grad()
            own().backward()
            o.step()
        for _ in range(5):
            first(o, own)
            o.step()
    assert equal(values(params), values(others)) and same_state(optimizer, other)
    assert optimizer.param_groups[0]["sam_step"] == other.param_groups[0]["sam_step"]


def test_a_checkpoint_of_the_base_optimizer_can_be_loaded(base):
    make, options = base
    params, ours = weights(), weights()
    plain = make(params, **options)
    give(params, 1)
    plain.step()
    optimizer = SAM([{"params": ours, "rho": 0.5}], make, **options)
    with torch.no_grad():
        for p, q in zip(ours, params, strict=True):
            p.copy_(q)
    (state,) = saved(plain.state_dict())
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["rho"] == 0.5
    given_cycle(optimizer, ours, 2)
    give(params, 2)
    plain.step()
    assert equal(values(ours), values(params))
