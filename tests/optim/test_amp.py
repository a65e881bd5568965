"""Under a `torch.amp.GradScaler`: one read for norm, clip and infinities; skipped steps leave no trace."""

import copy
import inspect
import math
import warnings

import pytest
import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import fastreg
from fastreg import ClipNorm
from fastreg.engine.launch import triton

# NumPy's, which runs Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

MAKE = {
    "clip": lambda params: fastreg.AdamW(params, lr=0.1, regularizers=[ClipNorm(0.5), fastreg.EMA(0.9)]),
    "largest": lambda params: fastreg.AdamW(params, lr=0.1, regularizers=[ClipNorm(0.1, math.inf)]),
    "fused": lambda params: fastreg.AdamW(params, lr=0.1, fused=True),
    "plain": lambda params: fastreg.AdamW(params, lr=0.1),
    "momentum": lambda params: fastreg.SGD(params, lr=0.1, momentum=0.9, regularizers=[ClipNorm(0.5)]),
    "capturable": lambda params: fastreg.AdamW(params, lr=0.1, capturable=True, regularizers=[ClipNorm(0.5)]),
}
CLIPS = {"clip": 2.0, "largest": math.inf, "momentum": 2.0, "capturable": 2.0}


def scaler(scale=2.0**10):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


def snapshot(optimizer, params):
    return copy.deepcopy(([p.detach() for p in params], optimizer.state_dict()["state"]))


def same(a, b):
    weights, states = zip(a, b, strict=True)
    return all(map(torch.equal, *weights)) and all(
        torch.equal(states[0][i][name], states[1][i][name]) for i in states[0] for name in states[0][i]
    )


@pytest.mark.parametrize("unscaled", (False, True), ids=("scaled", "unscaled by the user"))
@pytest.mark.parametrize("kind", MAKE)
def test_scaled_run_equals_torch_and_skips_what_is_infinite(kind, unscaled, backend, Race):
    race = Race([(6,), (3, 2)])
    ours = MAKE[kind](race.ours)
    plain = torch.optim.SGD(race.theirs, lr=0.1, momentum=0.9) if kind == "momentum" else None
    theirs = plain or torch.optim.AdamW(race.theirs, lr=0.1)
    scale = scaler()
    for turn in range(5):
        race.gradients()
        for p in race.ours:
            p.grad.mul_(scale.get_scale())
        bad = turn in (1, 3)
        if bad:
            race.ours[1].grad[1, 1] = math.nan if turn == 1 else -math.inf
        scale.scale(torch.ones(()))  # as `scaler.scale(loss)` before the backward pass
        before = snapshot(ours, race.ours)
        if unscaled:
            scale.unscale_(ours)
        scale.step(ours)
        scale.update()
        assert same(before, snapshot(ours, race.ours)) == bad
        if not bad:
            if kind in CLIPS:
                norm = torch.nn.utils.clip_grad_norm_(race.theirs, ours._grad_norm.clip.max_norm, CLIPS[kind])
                assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-6)
            theirs.step()
    assert scale.get_scale() == 2.0**8
    assert ours.state[race.ours[0]]["step"] == 3
    race.check()


class Seen(TorchDispatchMode):
    """Which operators touch any of the given tensors."""

    def __init__(self, tensors):
        super().__init__()
        self.addresses, self.calls = {t.untyped_storage().data_ptr() for t in tensors}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        if any(
            isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() in self.addresses for t in leaves
        ):
            self.calls.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ("clip", "momentum", "fused"))
def test_gradients_are_touched_by_the_engine_alone(kind, monkeypatch):
    """No operator reads a gradient during `scaler.step`; the engine launches the norm and the step."""
    params = [Parameter(torch.randn(40)) for _ in range(3)]
    optimizer, scale, launches = MAKE[kind](params), scaler(), []

    def log(name):
        run = getattr(triton, name)
        monkeypatch.setattr(triton, name, lambda *args: launches.append(name) or run(*args))

    log("run"), log("partial_norms")
    with fastreg.use_backend("triton"):
        for turn in range(2):
            for p in params:
                p.grad = torch.randn(40) * scale.get_scale()
            scale.scale(torch.ones(()))
            launches.clear()
            with Seen([p.grad for p in params]) as seen:
                scale.step(optimizer)
            assert launches == ["partial_norms", "run"]
            if turn:  # the first step has looked at layouts
                assert seen.calls == []
            scale.update()


def test_the_dispatch_mode_would_see_torchs_own_pass():
    """The test above can fail: an optimizer without `grad_scaler` has its gradients read and written."""
    params = [Parameter(torch.randn(40))]
    params[0].grad = torch.randn(40)
    scale = scaler()
    scale.scale(torch.ones(()))
    with Seen([params[0].grad]) as seen:
        scale.step(torch.optim.AdamW(params, fused=True))
    assert any("non_finite_check_and_unscale" in name for name in seen.calls)


@pytest.mark.parametrize("kind", MAKE)
def test_scalers_do_not_warn(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = [Parameter(torch.ones(3))]
        optimizer, scale = MAKE[kind](params), scaler()
        scale.scale(params[0].sum()).backward()
        scale.step(optimizer)
        scale.update()
    assert (params[0] < 1).all()


@pytest.mark.parametrize("kind", ("clip", "fused"))
def test_attributes_of_the_newer_agreement(kind, backend, Race):
    """`grad_scale` and `found_inf`, as scalers leave them for wrappers and users set them."""
    race = Race([(6,)])
    ours, theirs = MAKE[kind](race.ours), torch.optim.AdamW(race.theirs, lr=0.1)
    for turn in range(3):
        race.gradients()
        race.ours[0].grad.mul_(8)
        ours.grad_scale, ours.found_inf = torch.tensor(8.0), torch.tensor(float(turn == 1))
        before = snapshot(ours, race.ours)
        ours.step()
        assert same(before, snapshot(ours, race.ours)) == (turn == 1)
        if turn != 1:
            if kind == "clip":
                torch.nn.utils.clip_grad_norm_(race.theirs, 0.5)
            theirs.step()
    race.check()
    del ours.grad_scale, ours.found_inf
    race.step(ours, theirs)
    if kind == "fused":
        race.check()


def test_who_unscales():
    """Only where the step needs it: Lightning refuses to clip for optimizers that unscale themselves."""
    params = [Parameter(torch.ones(1))]
    assert not fastreg.AdamW(params)._step_supports_amp_scaling
    assert fastreg.AdamW(params, fused=True)._step_supports_amp_scaling
    assert fastreg.AdamW(params, regularizers=[ClipNorm(1.0)])._step_supports_amp_scaling
    assert copy.deepcopy(fastreg.SGD(params, fused=True))._step_supports_amp_scaling
    assert "grad_scaler" in inspect.signature(fastreg.AdamW(params).step).parameters


def test_a_scaler_that_does_not_know_the_optimizer():
    weight = Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    optimizer = MAKE["clip"]([weight])
    with pytest.raises(RuntimeError, match="has not been called with this AdamW"):
        optimizer.step(grad_scaler=scaler())


def test_a_scaler_with_ideas_of_its_own():
    """One that overrides `unscale_`, as for shards, checks in its own way."""
    calls = []

    class Sharded(torch.amp.GradScaler):
        def unscale_(self, optimizer):
            calls.append(optimizer)
            super().unscale_(optimizer)

    weight = Parameter(torch.ones(3))
    optimizer, scale = MAKE["clip"]([weight]), Sharded("cpu", init_scale=4.0)
    scale.scale(weight.sum()).backward()
    scale.step(optimizer)
    scale.update()
    assert calls == [optimizer] and (weight < 1).all()
    assert float(optimizer.grad_norm) == pytest.approx(3**0.5)


def test_float16_gradients_are_unscaled():
    """Whose unscaling in place torch refuses."""
    weight = Parameter(torch.ones(4, dtype=torch.float16))
    optimizer, scale = MAKE["clip"]([weight]), scaler()
    scale.scale(weight.sum()).backward()
    scale.step(optimizer)
    scale.update()
    assert float(optimizer.grad_norm) == pytest.approx(2.0)
