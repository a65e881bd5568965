"""SAM with gradients that are accumulated, and scaled by a GradScaler."""

import math

import pytest
import torch

import fastreg
from fastreg import SAM, ClipNorm

from .conftest import double, equal, values
from .sam_cases import BASES, PARTS, cycle, problem, same_state

# NumPy's, which runs Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]


# Accumulation --------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", SCALED)
def test_an_abandoned_overflow_skips_no_later_step(name):
    make, options = SCALED[name]
    params, loss = problem(torch.float32)
    optimizer = SAM(params, make, rho=0.5, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    scaler.scale(loss()).backward()
    params[0].grad[2, 1] = math.inf
    optimizer.first_step(zero_grad=True)
    optimizer.abandon()
    before = values(params)
    scaled_cycle(optimizer, scaler, params, loss)
    assert scaler.get_scale() == 2.0**8 and not equal(values(params), before)


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
    with pytest.raises(RuntimeError, match=r"does not reach the gradients that accumulate\(\) keeps"):
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
