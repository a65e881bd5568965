"""Gradients that are not finite: passed on, skipped without a trace, or reported at the next step."""

import copy
import math

import pytest
import torch

import fastreg
from fastreg import EMA, ClipNorm, GradientNoise

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's
BAD = (math.nan, math.inf, -math.inf)


def made(race, nonfinite="skip", regularizers=(), **options):
    return fastreg.AdamW(race.ours, lr=0.1, nonfinite=nonfinite, regularizers=regularizers, **options)


def state(optimizer, race):
    return copy.deepcopy(([p.detach() for p in race.ours], optimizer.state_dict()["state"]))


def equal(a, b):
    return all(map(torch.equal, a[0], b[0])) and all(
        torch.equal(a[1][i][name], b[1][i][name]) for i in a[1] for name in a[1][i]
    )


@pytest.mark.parametrize("capturable", (False, True))
@pytest.mark.parametrize("components", ((), (EMA(0.9), ClipNorm(1.0)), (GradientNoise(0.1),)), ids=len)
@pytest.mark.parametrize("bad", BAD)
def test_skip_leaves_no_trace(backend, bad, components, capturable, Race):
    """And training goes on as if the step had not been asked for, the noise of its count included."""
    race, twin = Race(), Race()
    optimizer = made(race, "skip", components, capturable=capturable, seed=1)
    other = made(twin, "skip", components, capturable=capturable, seed=1)
    for turn in range(4):
        race.gradients()
        for p, q in zip(twin.ours, race.ours, strict=True):
            p.grad = q.grad.clone()
        if turn == 1:
            race.ours[1].grad[2, 3] = bad
            before = state(optimizer, race)
            optimizer.step()
            assert equal(before, state(optimizer, race))
        else:
            optimizer.step()
            other.step()
    assert equal(state(optimizer, race), state(other, twin))
    assert optimizer.state[race.ours[0]]["step"] == 3


@pytest.mark.parametrize("how", ("option", "clip"))
def test_raise_reports_at_the_next_step(backend, how, Race):
    race = Race()
    options = (
        {"nonfinite": "raise"}
        if how == "option"
        else {"nonfinite": "propagate", "regularizers": [ClipNorm(1.0, error_if_nonfinite=True)]}
    )
    optimizer = made(race, **options)
    race.gradients()
    optimizer.step()
    race.ours[0].grad[3] = math.nan
    before = state(optimizer, race)
    optimizer.step()
    assert equal(before, state(optimizer, race))
    race.gradients()
    with pytest.raises(RuntimeError, match=r"gradients of the last step were not finite; it was skipped"):
        optimizer.step()
    assert equal(before, state(optimizer, race))
    optimizer.step()
    assert optimizer.state[race.ours[0]]["step"] == 2


def test_propagate_is_torchs_way(Race):
    race = Race()
    optimizer = made(race, "propagate")
    race.gradients()
    race.ours[0].grad[3] = math.nan
    optimizer.step()
    assert race.ours[0][3].isnan() and race.ours[0][2].isfinite() and race.ours[1].isfinite().all()


def test_finite_gradients_are_never_skipped(backend, Race):
    race = Race()
    optimizer, oracle = made(race, "skip"), torch.optim.AdamW(race.theirs, lr=0.1)
    for scale in (1e-30, 1.0, 1e15):
        race.gradients()
        for p, q in zip(race.ours, race.theirs, strict=True):
            p.grad.mul_(scale)
            q.grad.mul_(scale)
        optimizer.step()
        oracle.step()
    race.check()


def test_what_the_optimizer_was_told_survives_copies(Race):
    race = Race()
    optimizer = copy.deepcopy(made(race, "skip"))
    params = optimizer.param_groups[0]["params"]
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert all(p.isfinite().all() for p in params) and optimizer.state_dict()["state"][0]["step"] == 0


class Late:
    """A flag on a device that answers only when it is asked."""

    def __init__(self, value):
        self.value, self.asked, self.device = value, 0, torch.device("meta")

    def item(self):
        self.asked += 1
        return self.value


@pytest.mark.parametrize("skipped", (0.0, 1.0))
def test_the_verdict_is_read_later_and_once(skipped):
    """As on a GPU: the host counts at once, and corrects itself when it knows better."""
    from fastreg.engine.plan import Counts, SkipStatus

    counts, flag = Counts([3.0, 5.0], [None, None]), Late(skipped)
    counts.add({})
    verdict = SkipStatus(flag, counts, report=False)
    assert flag.asked == 0 and counts.on_host() == [4, 6]
    assert verdict.skipped() == verdict.skipped() == bool(skipped)
    assert flag.asked == 1 and counts.on_host() == ([3, 5] if skipped else [4, 6])
