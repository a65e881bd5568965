"""SAM restores weights bit for bit: missing and bad gradients, errors, checkpoints between passes."""

import math

import pytest
import torch

import fastreg
from fastreg import EMA, SAM

from .conftest import KINDS, equal, set_gradients, through_file, values, weights
from .sam_cases import BASES, fixed_cycle, problem, same_state

# NumPy's, which runs Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]


# Restoration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, kind",
    [
        ("fastreg", "float32"), ("torch", "float32"), ("fastreg", "remainder"),
        pytest.param("fastreg momentum", "float32", marks=pytest.mark.slow),
        pytest.param("torch momentum", "stochastic", marks=pytest.mark.slow),
        pytest.param("fastreg", "stochastic", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_1000_cycles_without_a_step_leave_every_bit(name, kind):
    (make, options), (dtype, rounding) = BASES[name], KINDS[kind]
    params, expected = weights(dtype), values(weights(dtype))
    if name.startswith("fastreg"):
        options = options | rounding
    optimizer = SAM(params, make, rho=0.5, **options | {"lr": 0.0, "weight_decay": 0.0})
    addresses = [p.data_ptr() for p in params]
    set_gradients(params, 0)
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
        set_gradients(ours, 10 + turn, *first)
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in ours if p.grad is not None))
        optimizer.first_step()
        for p, w in zip(ours, before, strict=True):
            expected = w if p.grad is None else w + 0.5 * p.grad / norm
            torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-6)
            assert torch.equal(p.detach(), w) == (p.grad is None)
        set_gradients(ours, turn, *second), set_gradients(theirs, turn, *second)
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
    set_gradients(ours, 1)
    for p in ours:
        if bad == 0:
            p.grad.zero_()
        elif p.dim() == 1:
            p.grad[7] = bad
    with fastreg.use_backend(backend):
        optimizer.first_step()
        assert equal(values(ours), values(theirs)) and optimizer.perturbed
        set_gradients(ours, 2), set_gradients(theirs, 2)
        optimizer.second_step(), plain.step()
    assert all(map(same, values(ours), values(theirs)))


def test_a_first_step_after_a_second_one_was_left_out(base):
    """The iteration is given up: weights come back, then are perturbed anew."""
    make, options = base
    params, others = weights(), weights()
    optimizer, other = SAM(params, make, rho=0.5, **options), SAM(others, make, rho=0.5, **options)
    set_gradients(params, 1)
    optimizer.first_step()
    set_gradients(params, 2), set_gradients(others, 2)
    optimizer.first_step(), other.first_step()
    assert equal(values(params), values(others))
    optimizer.restore()
    assert equal(values(params), values(weights())) and not optimizer.perturbed


@pytest.mark.parametrize("error", (ValueError, KeyboardInterrupt))
def test_a_closure_that_raises(base, error):
    make, options = base
    params = weights()
    optimizer = SAM(params, make, rho=0.5, **options)
    set_gradients(params, 1)

    def closure():
        assert not equal(values(params), values(weights()))
        raise error

    with pytest.raises(error):
        optimizer.step(closure)
    assert equal(values(params), values(weights())) and not optimizer.perturbed
    fixed_cycle(optimizer, params, 2)
    assert not equal(values(params), values(weights()))


def test_a_step_that_is_refused_leaves_the_weights_as_they_were():
    params = weights()
    optimizer = SAM(params, fastreg.AdamW, rho=0.5, nonfinite="raise")
    set_gradients(params, 1)
    optimizer.first_step()
    set_gradients(params, 2)
    params[0].grad[3] = math.nan
    optimizer.second_step()
    assert equal(values(params), values(weights()))  # skipped; the next step tells
    set_gradients(params, 3)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.second_step()
    assert equal(values(params), values(weights())) and not optimizer.perturbed


def test_evaluation_before_a_step_is_begun_anew():
    ours, theirs = weights(), weights()
    optimizer, other = (SAM(p, fastreg.AdamW, rho=0.5, regularizers=[EMA(0.5)]) for p in (ours, theirs))
    for seed in range(3):
        set_gradients(ours, 10 + seed)
        optimizer.first_step()
        optimizer.restore()
        optimizer.eval()
        assert seed == 0 or not equal(values(ours), values(theirs))
        optimizer.train()
        fixed_cycle(optimizer, ours, seed)
        fixed_cycle(other, theirs, seed)
    assert equal(values(ours), values(theirs))


# Checkpoints ---------------------------------------------------------------------------------------------

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
    weights, state = through_file(values(params), optimizer.state_dict())

    others, other_loss, other = made()
    fixed_cycle(other, others, 3)  # what it holds before is forgotten
    with torch.no_grad():
        for p, w in zip(others, weights, strict=True):
            p.copy_(w)
    other.load_state_dict(state)
    assert other.perturbed == (where == "between passes")
    for o, o_loss in ((optimizer, loss), (other, other_loss)):
        if where == "between passes":
            o.zero_grad()
            o_loss().backward()
            o.step()
        for _ in range(5):
            first(o, o_loss)
            o.step()
    assert equal(values(params), values(others)) and same_state(optimizer, other)
    assert optimizer.param_groups[0]["sam_step"] == other.param_groups[0]["sam_step"]


def test_a_checkpoint_of_the_base_optimizer_can_be_loaded(base):
    make, options = base
    params, ours = weights(), weights()
    plain = make(params, **options)
    set_gradients(params, 1)
    plain.step()
    optimizer = SAM([{"params": ours, "rho": 0.5}], make, **options)
    with torch.no_grad():
        for p, q in zip(ours, params, strict=True):
            p.copy_(q)
    (state,) = through_file(plain.state_dict())
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["rho"] == 0.5
    fixed_cycle(optimizer, ours, 2)
    set_gradients(params, 2)
    plain.step()
    assert equal(values(ours), values(params))
