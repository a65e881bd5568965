"""SAM behind the interface of torch's optimizers: closures, schedules, groups, copies, hooks."""

import copy
import math
import pickle

import pytest
import torch

import fastreg
from fastreg import SAM, ClipNorm

from .conftest import double, equal, set_gradients, values, weights
from .sam_cases import BASES, CURVATURE, cycle, fixed_cycle, quadratic, same_state

# NumPy's, which runs Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]


# The interface -------------------------------------------------------------------------------------------


def test_schedulers_do_not_warn(base):
    """Warnings are errors here: torch would miss `optimizer.step()` in a loop of first and second steps."""
    make, options = base
    params = weights()
    optimizer = SAM(params, make, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for seed in range(3):
        fixed_cycle(optimizer, params, seed)
        scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.1 / 8


def test_step_is_the_second_step_while_perturbed(base):
    make, options = base
    ours, theirs = weights(), weights()
    optimizer, other = SAM(ours, make, rho=0.5, **options), SAM(theirs, make, rho=0.5, **options)
    for seed in range(2):
        set_gradients(ours, 10 + seed)
        optimizer.first_step()
        set_gradients(ours, seed)
        assert optimizer.step() is None
        fixed_cycle(other, theirs, seed)
    assert equal(values(ours), values(theirs)) and same_state(optimizer, other)


def test_out_of_order():
    params = weights()
    optimizer = SAM(params, fastreg.AdamW)
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match=r"call first_step\(\) after the first backward pass"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"second_step\(\) comes after first_step"):
        optimizer.second_step()
    with pytest.raises(RuntimeError, match=r"accumulate\(\) comes after first_step"):
        optimizer.accumulate()
    assert equal(values(params), values(weights()))
    fixed_cycle(optimizer, params, 0)
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
        loss = optimizer.step(closure)
        assert len(losses) == (1 if convention in ("second", "perturbed already") else 2)
        assert loss is losses[0]
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
    set_gradients(params, 1)
    for factor in (1.0, 0.5):
        for group in optimizer.param_groups[1:]:
            group["rho"] *= factor
        optimizer.first_step()
        assert torch.equal(params[0].detach(), start[0])
        # The norm is that of what is perturbed.
        norm = torch.cat([p.grad.flatten() for p in params[1:]]).norm()
        for p, w, rho in zip(params[1:], start[1:], (0.3, 0.7), strict=True):
            torch.testing.assert_close(p.detach(), w + factor * rho * p.grad / norm, rtol=1e-6, atol=1e-6)
        state = optimizer.state_dict()["state"]
        assert ["sam_backup" in state.get(i, {}) for i in range(3)] == [False, True, True]
        optimizer.restore()
        assert equal(values(params), start)
    assert not any("sam_backup" in optimizer.state.get(p, {}) for p in params)


def test_adaptive_by_group():
    """All share one norm: that of T g with T = |w| + η or 1."""
    params = weights()
    groups = [{"params": params[:1], "adaptive": True, "eta": 0.1}, {"params": params[1:]}]
    optimizer = SAM(groups, fastreg.SGD, rho=0.4, lr=0.1)
    start = values(params)
    set_gradients(params, 1)
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
    set_gradients(ours, 5)
    if perturbed:
        optimizer.first_step()
    optimizer.add_param_group({"params": ours[1:], "rho": 0.25})
    if not perturbed:
        optimizer.first_step()
    for p, w in zip(ours[1:], weights()[1:], strict=True):
        assert torch.equal(p, w) == perturbed
    for seed in range(2):
        set_gradients(ours, seed), set_gradients(theirs, seed)
        optimizer.second_step(), plain.step()
        assert equal(values(ours), values(theirs))
        set_gradients(ours, 10)
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
    fixed_cycle(optimizer, params, 1)
    set_gradients(params, 2)
    optimizer.step()
    if perturbed:
        set_gradients(params, 3)
        optimizer.first_step()
    twin, twins = how((optimizer, params))
    assert twin.param_groups[0]["params"][0] is twins[0] and twins[0] is not params[0]
    for o, o_params in ((optimizer, params), (twin, twins)):
        if not perturbed:
            set_gradients(o_params, 3)
            o.first_step()
        set_gradients(o_params, 4)
        o.second_step()
        set_gradients(o_params, 5)
        o.step()
        fixed_cycle(o, o_params, 6)
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
    set_gradients(params, 1)
    if way == "closure":
        optimizer.step(lambda: set_gradients(params, 2))
    else:
        optimizer.first_step()
        assert calls == []
        set_gradients(params, 2)
        getattr(optimizer, way)()
    assert calls == ["before", "after"]


def test_what_the_base_optimizer_offers():
    params = weights()
    optimizer = SAM(params, fastreg.AdamW, regularizers=[ClipNorm(1.0)])
    assert optimizer.grad_norm is None and optimizer.perturbation_norm is None
    fixed_cycle(optimizer, params, 1)
    exact = torch.cat([p.grad.double().flatten() for p in params]).norm()
    assert float(optimizer.grad_norm) == pytest.approx(float(exact), rel=1e-6)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        optimizer.nonsense  # noqa: B018
    assert optimizer.state is optimizer.base_optimizer.state
    assert optimizer.defaults is optimizer.base_optimizer.defaults
    assert optimizer.engine is optimizer.fused_optimizer is optimizer.base_optimizer
    assert not hasattr(SAM(weights(), torch.optim.SGD, lr=0.1), "averaged")
