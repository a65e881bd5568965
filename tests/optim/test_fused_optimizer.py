"""The step as a user of torch.optim knows it: schedulers, closures, groups, hooks, scaling, clipping."""

import math
import warnings

import pytest
import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

import fastreg
from fastreg import ClipNorm
from fastreg.engine.launch.compiled import compiled_step

SCHEDULERS = {
    "lambda": lambda o: LambdaLR(o, lambda epoch: 0.7**epoch),
    "one cycle": lambda o: OneCycleLR(o, max_lr=0.05, total_steps=8),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=0, factor=0.3),
}


@pytest.fixture(params=("adamw", "momentum", "lion"))
def rule(request, rules):
    """A rule of each kind; all rules step as their oracles do in `tests/kernels/test_rules.py`."""
    return rules[request.param]


def test_step_equals_torch(rule, backend, Race):
    race = Race()
    ours, theirs = rule(race.ours), rule.oracle(race.theirs)
    for _ in range(4):
        race.step(ours, theirs)
    race.check()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(rule, scheduler, Race):
    race = Race()
    ours, theirs = rule(race.ours), rule.oracle(race.theirs)
    schedules = [SCHEDULERS[scheduler](ours), SCHEDULERS[scheduler](theirs)]
    rates = set()
    for _ in range(6):
        race.step(ours, theirs)
        rates.add(ours.param_groups[0]["lr"])
        for schedule in schedules:
            schedule.step(*([1.0] if scheduler == "plateau" else []))
    assert len(rates) >= 5
    race.check()


def test_tensor_learning_rate(rule, backend, Race):
    race, rates = Race(), [torch.tensor(0.02), torch.tensor(0.02)]
    ours, theirs = rule(race.ours, lr=rates[0]), rule.oracle(race.theirs, lr=rates[1])
    for factor in (1.0, 0.5, 0.25):
        for rate in rates:
            rate.fill_(0.02 * factor)
        race.step(ours, theirs)
    assert ours.param_groups[0]["lr"] is rates[0]
    race.check()


@pytest.mark.parametrize("size", (7, 1000))
def test_changing_numbers_compile_nothing(rule, Race, size):
    race = Race([(size,), (size, 3)])
    ours, theirs = rule(race.ours), rule.oracle(race.theirs)
    with fastreg.use_backend("compiled"):
        race.step(ours, theirs)
        compiled = compiled_step.cache_info().misses
        stats = sum(torch._dynamo.utils.counters["stats"].values())
        assert compiled > 0
        for step in range(4):
            for group in (*ours.param_groups, *theirs.param_groups):
                group.update(lr=step, weight_decay=step / 3)
            race.step(ours, theirs)
    assert compiled_step.cache_info().misses == compiled
    assert sum(torch._dynamo.utils.counters["stats"].values()) == stats
    race.check()


@pytest.mark.parametrize("clip", (False, True))
def test_closure(rule, clip):
    weight = Parameter(torch.ones(5))
    optimizer = rule([weight], regularizers=[ClipNorm(1.0)] if clip else [])

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == 5 and loss.requires_grad
    assert (weight != 1).all()
    assert optimizer.step() is None


def test_gradients_now_and_then(rule, backend, Race):
    race = Race()
    ours, theirs = rule(race.ours), rule.oracle(race.theirs)
    for without in ((0, 2), (0,), (), (1,), (0, 1), ()):
        race.step(ours, theirs, *without)
    race.check()
    assert [int(ours.state[p]["step"]) for p in race.ours] == [3, 4, 5]


def test_no_gradients_is_no_step(rule, backend, Race):
    race = Race()
    optimizer = rule(race.ours, regularizers=[ClipNorm(1.0), fastreg.EMA(0.5)])
    optimizer.step()
    assert not optimizer.state and optimizer.grad_norm is None
    race.gradients()
    optimizer.step()
    before = [p.detach().clone() for p in race.ours]
    optimizer.zero_grad()
    optimizer.step()
    assert all(map(torch.equal, before, race.ours))
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


@pytest.mark.parametrize("rule", ("adamw", "nesterov"), indirect=True)
@pytest.mark.parametrize("shape", ((0,), (3, 0), (), (1,), (1, 1, 1)))
def test_smallest_tensors(rule, backend, Race, shape):
    race = Race([shape, (2,)])
    regularizers = [ClipNorm(1e9), fastreg.EMA(0.5)]
    ours, theirs = rule(race.ours, regularizers=regularizers), rule.oracle(race.theirs)
    for _ in range(2):
        race.step(ours, theirs)
    race.check()
    assert ours.state[race.ours[0]]["ema"].shape == shape


def test_only_empty_tensors(rule, backend, Race):
    race = Race([(0,), (2, 0)])
    optimizer = rule(race.ours, regularizers=[ClipNorm(1.0), fastreg.EMA(0.5)])
    race.gradients()
    optimizer.step()
    assert optimizer.grad_norm == 0


def test_freezing(rule, Race):
    race = Race()
    ours, theirs = rule(race.ours), rule.oracle(race.theirs)
    for frozen in (True, True, False, True, False):
        for parameters, optimizer in ((race.ours, ours), (race.theirs, theirs)):
            parameters[1].requires_grad_(not frozen)
            optimizer.zero_grad()
            sum((p - 3).square().sum() for p in parameters).backward()
            optimizer.step()
        assert (race.ours[1].grad is None) == frozen
    race.check()


REPEATED = ("adamw-defaults", "amsgrad", "sgd")
"""Rules whose groups differ as those of other rules do."""


@pytest.mark.slow(backend="compiled", rule=REPEATED)
@pytest.mark.parametrize("rule", ("adamw", "adam", "momentum", "nesterov", "lion", *REPEATED), indirect=True)
def test_groups(rule, backend, Race):
    """Some differ in amsgrad, maximize or nesterov, so that one step has several rules."""
    race = Race()
    ours, theirs = (
        make([{"params": [p], **option} for p, option in zip(parameters, rule.groups, strict=True)])
        for make, parameters in ((rule, race.ours), (rule.oracle, race.theirs))
    )
    for _ in range(3):
        race.step(ours, theirs)
    race.check()


def test_groups_added_later(rule, backend, Race):
    race = Race()
    ours, theirs = rule(race.ours[:1]), rule.oracle(race.theirs[:1])
    for i in (1, 2):
        race.step(ours, theirs)
        ours.add_param_group({"params": race.ours[i], "lr": 0.03 * i})
        theirs.add_param_group({"params": race.theirs[i], "lr": 0.03 * i})
    for _ in range(2):
        race.step(ours, theirs)
    race.check()
    assert [int(ours.state[p]["step"]) for p in race.ours] == [4, 3, 2]


def test_different_step_counts_share_a_launch(Race):
    race = Race([(5,), (6,)])
    optimizer = fastreg.AdamW([{"params": race.ours[0]}, {"params": race.ours[1], "lr": 0.5}])
    race.gradients(1)
    optimizer.step()
    race.gradients()
    (batch,) = optimizer._plan_step(optimizer._operands().with_gradient()).batches
    assert batch.steps == [2, 1] and batch.rows == [0, 1]


def test_gradients_and_addresses_are_left_alone(rule, backend, Race):
    race = Race()
    optimizer = rule(race.ours, regularizers=[ClipNorm(0.1), fastreg.EMA(0.9)])
    for _ in range(2):
        race.gradients()
        kept = [(p.grad, p.grad.clone(), p.grad._version, p.data_ptr()) for p in race.ours]
        optimizer.step()
        for p, (gradient, values, version, address) in zip(race.ours, kept, strict=True):
            assert p.grad is gradient and torch.equal(gradient, values) and gradient._version == version
            assert p.data_ptr() == address


def test_autograd_notices_the_update(rule, backend):
    """A graph that saved the old weight must not be walked with the new one."""
    weight = Parameter(torch.ones(4))
    optimizer = rule([weight])
    loss = weight.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_is_what_it_stands_in_for(rule, Race):
    race = Race()
    ours, theirs = rule(race.ours), rule.oracle(race.theirs)
    assert isinstance(ours, torch.optim.Optimizer)
    if rule.drop_in:
        assert isinstance(ours, rule.theirs)
        assert repr(ours) == repr(theirs)
        assert ours.param_groups[0].keys() == theirs.param_groups[0].keys()
        assert ours.defaults == theirs.defaults


@pytest.mark.parametrize("to_none", (True, False))
def test_zero_grad(rule, Race, to_none):
    race = Race()
    optimizer = rule(race.ours)
    race.gradients()
    optimizer.zero_grad(set_to_none=to_none)
    assert all(p.grad is None if to_none else not p.grad.any() for p in race.ours)


def test_named_parameters(rule):
    model = torch.nn.Linear(2, 2)
    optimizer = rule(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    other = rule(model.named_parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["param_names"] == ["weight", "bias"]


def test_hooks_fire_once_and_in_order(rule, Race):
    race = Race()
    optimizer, seen = rule(race.ours), []
    before = [p.detach().clone() for p in race.ours]

    def pre(optimizer, args, kwargs):
        seen.append(("pre", all(map(torch.equal, race.ours, before))))

    def post(optimizer, args, kwargs):
        seen.append(("post", not any(map(torch.equal, race.ours, before))))

    optimizer.register_step_post_hook(post)
    optimizer.register_step_pre_hook(pre)
    race.gradients()
    optimizer.step()
    assert seen == [("pre", True), ("post", True)]


def test_subclasses_fire_hooks_once(rule, Race):
    race = Race()
    mine = type("Mine", (rule.ours,), {})
    optimizer, seen = mine(race.ours), []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    race.gradients()
    optimizer.step()
    assert seen == [1] and optimizer.state[race.ours[0]]["step"] == 1


def test_clip(rule, backend, Race):
    race = Race()
    limit = ClipNorm(1.0)
    ours, theirs = (
        make([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.02}], **options)
        for make, parameters, options in (
            (rule, race.ours, {"regularizers": [limit, fastreg.EMA(0.5)]}),
            (rule.oracle, race.theirs, {}),
        )
    )
    assert ours.grad_norm is None
    for limit.max_norm in (1.0, 0.3, 1e4, math.inf):
        race.gradients()
        norm = torch.nn.utils.clip_grad_norm_(race.theirs, limit.max_norm)
        ours.step()
        theirs.step()
        assert ours.grad_norm.shape == ()
        assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-6)
    race.check()


def test_grad_norm_of_a_step_is_kept(Race):
    race = Race()
    optimizer = fastreg.SGD(race.ours, lr=0.1, regularizers=[ClipNorm(1.0)])
    history = []
    for scale in (1, 2):
        for p in race.ours:
            p.grad = torch.full_like(p, scale)
        optimizer.step()
        history.append(optimizer.grad_norm)
    assert history[1] == 2 * history[0]


def test_no_clip_no_norm(rule, Race):
    race = Race()
    optimizer = rule(race.ours)
    race.gradients()
    optimizer.step()
    assert optimizer.grad_norm is None


@pytest.mark.parametrize("bad", (math.nan, math.inf))
@pytest.mark.parametrize("clip", (False, True))
def test_what_is_not_finite_spreads_as_in_torch(rule, backend, clip, bad, Race):
    race = Race()
    regularizers = [ClipNorm(1.0), fastreg.EMA(0.5)] if clip else []
    ours, theirs = rule(race.ours, regularizers=regularizers), rule.oracle(race.theirs)
    race.gradients()
    for p in (race.ours[0], race.theirs[0]):
        p.grad[3] = bad
    if clip:
        torch.nn.utils.clip_grad_norm_(race.theirs, 1.0)
    with warnings.catch_warnings():
        # NumPy's, which runs Triton's interpreter.
        warnings.filterwarnings("ignore", "invalid value encountered", RuntimeWarning)
        ours.step()
    theirs.step()
    for p, q in zip(race.ours, race.theirs, strict=True):
        assert torch.equal(p.isfinite(), q.isfinite()) and torch.equal(p.isnan(), q.isnan())


def test_several_dtypes_in_one_step(backend, Race):
    races = [Race([(9,), (2, 3)], dtype) for dtype in (torch.float32, torch.float64)]
    regularizers = [ClipNorm(1.0), fastreg.EMA(0.5)]
    ours = fastreg.AdamW([p for race in races for p in race.ours], lr=0.1, regularizers=regularizers)
    theirs = torch.optim.AdamW([p for race in races for p in race.theirs], lr=0.1, foreach=False)
    for _ in range(3):
        for race in races:
            race.gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for race in races for p in race.theirs])
        torch.nn.utils.clip_grads_with_norm_([p for race in races for p in race.theirs], 1.0, norm.double())
        ours.step()
        theirs.step()
    races[0].check()
    for p, q in zip(races[1].ours, races[1].theirs, strict=True):  # the norm includes the float32 half
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_the_default_device_does_not_matter(rule, backend, Race):
    race = Race()
    regularizers = [ClipNorm(math.inf), fastreg.EMA(0.5)]
    ours, theirs = rule(race.ours, regularizers=regularizers), rule.oracle(race.theirs)
    for _ in range(2):
        race.gradients()
        with torch.device("meta"):
            ours.step()
        theirs.step()
    race.check()


@pytest.mark.parametrize("form", ("mapping", "sequence"))
def test_gradients_given_to_step_replace_those_of_parameters(rule, form, Race):
    race = Race()
    ours, theirs = rule(race.ours), rule.oracle(race.theirs)
    race.gradients()
    gradients = [None if i == 1 else p.grad.clone() for i, p in enumerate(race.ours)]
    by_parameter = {p: g for p, g in zip(race.ours, gradients, strict=True) if g is not None}
    ours.step(gradients=by_parameter if form == "mapping" else gradients)
    race.theirs[1].grad = None
    theirs.step()
    race.check()
    with pytest.raises(ValueError, match="gradients must hold one for each of"):
        ours.step(gradients=gradients[:1])


def test_components_are_added_and_removed(Race):
    race = Race()
    optimizer = fastreg.AdamW(race.ours, regularizers=[fastreg.EMA(0.9)])
    clip, before = ClipNorm(1.0), optimizer.components
    optimizer.add_component(clip)
    assert clip in optimizer.components and optimizer._pieces == optimizer.components
    with pytest.raises(ValueError, match="given more than once"):
        optimizer.add_component(ClipNorm(2.0))
    race.gradients()
    optimizer.step()
    assert optimizer.grad_norm > 0
    optimizer.remove_component(clip)
    assert optimizer.components == before and optimizer.grad_norm is None
    optimizer.step()


LATER = {
    "relative noise": (lambda: fastreg.GradientNoise(0.1, relative=True), {"seed": 3}),
    "norm": (lambda: ClipNorm(0.1, math.inf), {}),
    "average": (lambda: fastreg.EMA(0.9, "slow"), {"regularizers": [fastreg.EMA(0.9)]}),
}


@pytest.mark.parametrize("make, options", LATER.values(), ids=LATER)
def test_a_component_added_later_does_what_it_does_from_the_start(make, options, Race):
    race = Race()
    early = {**options, "regularizers": [*options.get("regularizers", ()), make()]}
    theirs = fastreg.AdamW(race.theirs, **early)
    ours = fastreg.AdamW(race.ours, **options)
    ours.add_component(make())
    assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
    for _ in range(2):
        race.gradients()
        ours.step()
        theirs.step()
    assert all(map(torch.equal, race.ours, race.theirs))


def test_a_norm_that_refuses_nan_may_be_added_later():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = fastreg.AdamW([weight])
    clip = ClipNorm(1.0, error_if_nonfinite=True)
    optimizer.add_component(clip)
    weight.grad = torch.full((2,), math.nan)
    optimizer.step()
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(2))
    optimizer.remove_component(clip)
    optimizer.step()
    assert weight.isnan().all()


def test_components_that_cannot_be_added_or_removed_are_refused():
    optimizer = fastreg.AdamW(
        [torch.nn.Parameter(torch.ones(2))], regularizers=[fastreg.MSAM(), fastreg.SlowWeights()]
    )
    before = optimizer.components
    for component, message in (
        ("x", "must be components"), (fastreg.MSAM(), "constructor"),
        (fastreg.EMA(name="exp_avg"), "is taken"),
        (fastreg.SlowWeights(name="other"), "more than once"), (fastreg.EMA(name="slow"), "is taken"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            optimizer.add_component(component)
        assert optimizer.components == before
    for component in (ClipNorm(1.0), *(c for c in before if not isinstance(c, fastreg.SlowWeights))):
        with pytest.raises(ValueError, match=r"must be one of \[SlowWeights.*, got"):
            optimizer.remove_component(component)


def test_only_the_component_that_has_a_buffer_says_what_it_starts_as():
    class Tens(fastreg.L2SP):
        def initial(self, name, index, parameter):
            return torch.full_like(parameter, 10.0)

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = fastreg.Adam([weight], betas=(0.5, 0.5), regularizers=[Tens(0.0)])
    weight.grad = torch.ones(2)
    optimizer.step()
    state = optimizer.state[weight]
    assert state["l2_sp_start"].tolist() == [10, 10] and state["exp_avg"].tolist() == [0.5, 0.5]
