"""`capturable=True`: the device counts, and works out in double what depends on the count."""

import math

import pytest
import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import fastreg
from fastreg import EMA, ClipNorm, GradientNoise

MAKE = {
    "adamw": (fastreg.AdamW, {"weight_decay": 0.1}),
    "amsgrad": (fastreg.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "lion": (fastreg.Lion, {"weight_decay": 0.1}),
    "independent": (fastreg.AdamW, {"decay": "independent"}),
    "noise": (fastreg.AdamW, {"regularizers": [GradientNoise(0.1, gamma=0.55), EMA(0.9)], "seed": 1}),
}


@pytest.mark.slow(backend="compiled", kind="noise")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("kind", MAKE)
def test_equals_counting_on_the_host(kind, dtype, backend, Race, close):
    """With groups, late gradients and a tensor learning rate."""
    make, options = MAKE[kind]
    results = []
    for capturable in (False, True):
        race = Race(((33,), (4, 5), (), (2, 2)), dtype)
        rate = torch.tensor(0.02, dtype=torch.float64)
        groups = [{"params": race.ours[:2]}, {"params": race.ours[2:], "lr": 0.05}]
        optimizer = make(groups, lr=rate, capturable=capturable, **options)
        for turn in range(4):
            race.gradients(*((1, 2) if turn == 1 else ()))
            rate.fill_(0.02 / (turn + 1))
            optimizer.step()
        results.append([p.detach() for p in race.ours])
        assert [int(optimizer.state[p]["step"]) for p in race.ours] == [4, 3, 3, 4]
    close(*results)


class NoItem(TorchDispatchMode):
    """Refuses what would wait for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function), "waits for the device"
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(Race):
    """On a CPU the kernels' interpreter reads memory by itself; no operator asks for a number."""
    race = Race()
    optimizer = fastreg.AdamW(
        race.ours, lr=torch.tensor(0.1), capturable=True, regularizers=[ClipNorm(1.0), EMA(0.9)]
    )
    with fastreg.use_backend("triton"):
        for _ in range(3):
            race.gradients()
            with NoItem():
                optimizer.step()
    assert (torch.stack([optimizer.state[p]["step"] for p in race.ours]) == 3).all()


def test_host_and_device_counts_side_by_side(Race):
    race = Race()
    optimizer = fastreg.AdamW(
        [{"params": race.ours[:1]}, {"params": race.ours[1:], "capturable": True}], lr=0.1, nonfinite="skip"
    )
    theirs = torch.optim.AdamW(race.theirs, lr=0.1)
    for turn in range(4):
        race.gradients()
        if turn == 2:
            race.ours[2].grad.fill_(math.inf)
            optimizer.step()
        else:
            optimizer.step()
            theirs.step()
    race.check()
    assert [int(optimizer.state[p]["step"]) for p in race.ours] == [3, 3, 3]


def test_switching_between_steps(Race):
    race = Race()
    ours, theirs = fastreg.AdamW(race.ours, lr=0.1), torch.optim.AdamW(race.theirs, lr=0.1)
    for capturable in (False, True, True, False):
        ours.param_groups[0]["capturable"] = capturable
        race.step(ours, theirs)
    race.check()


def test_checkpoints_do_not_change_it(Race):
    race = Race()
    saved = fastreg.AdamW(race.ours, capturable=True, foreach=True)
    race.gradients()
    saved.step()
    plain = fastreg.AdamW(race.ours, fused=True)
    plain.load_state_dict(saved.state_dict())
    assert {k: plain.param_groups[0][k] for k in ("capturable", "foreach", "fused", "differentiable")} == {
        "capturable": False, "foreach": None, "fused": True, "differentiable": False
    }  # fmt: skip
    plain.step()
    assert plain.state[race.ours[0]]["step"] == 2


def test_capture_without_it_is_refused(monkeypatch):
    weight = Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = fastreg.AdamW([weight], capturable=True)
    capturing(monkeypatch)
    with pytest.raises(RuntimeError, match=r"capture of SGD\.step\(\) needs capturable=True in every group"):
        fastreg.SGD([weight]).step()
    with pytest.raises(RuntimeError, match=r"the first AdamW\.step\(\).*take a step before the capture"):
        optimizer.step()
    assert (weight == 1).all() and not optimizer.state
    monkeypatch.undo()
    optimizer.step()
    capturing(monkeypatch)
    optimizer.step()
    assert optimizer.state[weight]["step"] == 2


def capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
