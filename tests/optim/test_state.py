"""State: torch's names and layouts, loaded in both directions, copied, moved, and never lost."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn import Parameter

import fastreg
from fastreg import EMA, ClipNorm, GradientNoise

FULL = (ClipNorm, 1.0), (GradientNoise, 0.01), (EMA, 0.9)


def full():
    return [component(value) for component, value in FULL]


def through_disk(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a, b) -> bool:
    """Whether two state dicts are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("adamw-defaults", "adam", "nesterov")]


@pytest.fixture(params=("adamw", "amsgrad", "sgd", "momentum", "lion", *SLOW))
def rule(request, rules):
    return rules[request.param]


def test_state_is_that_of_torch(rule, Race):
    race = Race([(3, 4), ()])
    ours, theirs = rule(race.ours), rule.oracle(race.theirs)
    assert not ours.state
    race.step(ours, theirs, 1)
    assert set(ours.state) == {race.ours[0]}
    state, expected = ours.state[race.ours[0]], theirs.state[race.theirs[0]]
    assert state.keys() == expected.keys() | {"step"}
    for name in expected:
        assert state[name].shape == expected[name].shape and state[name].dtype == expected[name].dtype
    assert state["step"].shape == () and state["step"].dtype == torch.float32
    assert state["step"].device.type == "cpu" and state["step"] == 1


@pytest.mark.parametrize("carry", (lambda state: state, copy.deepcopy, through_disk))
def test_resume_is_exact(rule, carry, Race):
    race = Race()
    first = rule(race.ours, regularizers=full(), seed=3)
    for _ in range(2):
        race.gradients()
        first.step()
    resumed = [Parameter(p.detach().clone()) for p in race.ours]
    second = rule(resumed, lr=7.0, regularizers=full(), seed=4)
    second.load_state_dict(carry(first.state_dict()))
    assert second.seed == 3
    for _ in range(2):
        race.gradients()
        for p, q in zip(race.ours, resumed, strict=True):
            q.grad = p.grad.clone()
        first.step()
        second.step()
    assert all(map(torch.equal, race.ours, resumed))
    assert same(first.state_dict(), second.state_dict())
    assert first.grad_norm == second.grad_norm


@pytest.mark.parametrize("duplicate", (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))))
def test_copies_go_on_independently(rule, duplicate, Race):
    race = Race()
    optimizer = rule(race.ours, regularizers=full())
    for _ in range(2):
        race.gradients()
        optimizer.step()
    other = duplicate(optimizer)
    copied = [p for group in other.param_groups for p in group["params"]]
    assert other.seed == optimizer.seed and repr(other) == repr(optimizer)
    before, state = [p.detach().clone() for p in copied], copy.deepcopy(other.state_dict())
    race.gradients()
    optimizer.step()
    assert all(map(torch.equal, copied, before)) and same(other.state_dict(), state)
    for p, q in zip(race.ours, copied, strict=True):
        q.grad = p.grad.clone()
    other.step()
    assert all(map(torch.equal, race.ours, copied))
    assert same(other.state_dict(), optimizer.state_dict())


def test_copies_draw_relative_noise(Race):
    race = Race()
    first = fastreg.SGD(race.ours, lr=0.1, regularizers=[fastreg.GradientNoise(0.1, relative=True)], seed=1)
    other = copy.deepcopy(first)
    race.gradients()
    copied = [p for group in other.param_groups for p in group["params"]]
    for p, q in zip(race.ours, copied, strict=True):
        q.grad = p.grad.clone()
    first.step()
    other.step()
    assert all(map(torch.equal, race.ours, copied))


@pytest.mark.parametrize("carry", (copy.deepcopy, through_disk))
def test_exchange_with_torch(rule, carry, Race):
    race = Race()
    ours, theirs = rule(race.ours), rule.oracle(race.theirs)
    for _ in range(3):
        race.step(ours, theirs)
    race.check()
    make_ours, make_theirs = rule(race.ours, lr=9.0), rule.oracle(race.theirs, lr=9.0)
    make_ours.load_state_dict(carry(theirs.state_dict()))
    make_theirs.load_state_dict(carry(ours.state_dict()))
    for _ in range(3):
        race.step(make_ours, make_theirs)
    race.check()


@pytest.mark.parametrize("carry", (lambda state: state, through_disk))
@pytest.mark.parametrize("order", ("torch, fastreg, torch", "fastreg, torch, fastreg"))
def test_changing_hands_mid_run_is_the_uninterrupted_run(rule, order, carry, backend, Race):
    """Also where the one that goes on was made with other values."""
    if not rule.drop_in:
        pytest.skip("torch has none")
    race = Race()
    uninterrupted = rule.oracle(race.theirs)
    optimizer = None
    for name in order.split(", "):
        previous = optimizer
        optimizer = (rule if name == "fastreg" else rule.oracle)(
            race.ours, lr=9.0 if previous else rule.options.get("lr", 1e-3)
        )
        if previous is not None:
            optimizer.load_state_dict(carry(previous.state_dict()))
        for turn in range(4):
            race.step(optimizer, uninterrupted, *((1,) if turn == 2 else ()))
    race.check()


def test_options_that_a_checkpoint_does_not_know_are_kept(Race):
    """A checkpoint of torch's says nothing of the kind of decay or the seed."""
    race = Race()
    make = {"regularizers": [GradientNoise(0.1)], "seed": 7, "decay": "independent"}
    ours = fastreg.AdamW([{"params": race.ours, "decay": "cautious"}], lr=0.5, **make)
    ours.add_param_group({"params": Parameter(torch.ones(1))})
    theirs = torch.optim.AdamW([{"params": race.theirs}, {"params": Parameter(torch.ones(1))}], lr=0.1)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["decay"] == "cautious" and ours.seed == 7
    assert ours.param_groups[1]["lr_max"] == 0.5 and ours.param_groups[1]["lr"] == 0.1


@pytest.mark.parametrize("flags", ({"fused": True}, {"foreach": True}, {"capturable": True}))
def test_flags_of_torchs_checkpoints_do_not_matter(flags, Race):
    race = Race()
    theirs = torch.optim.AdamW(race.theirs, lr=0.1)
    ours = fastreg.AdamW(race.ours, lr=0.1)
    race.gradients()
    theirs.step()
    saved = theirs.state_dict()
    saved["param_groups"][0].update(flags)
    ours.load_state_dict(saved)
    assert not any(ours.param_groups[0][name] for name in ("fused", "foreach", "capturable"))
    with torch.no_grad():
        for p, q in zip(race.ours, race.theirs, strict=True):
            p.copy_(q)
    for _ in range(2):
        race.step(ours, theirs)
    race.check()


def test_torch_loads_what_has_averages(Race):
    race = Race()
    ours, theirs = fastreg.AdamW(race.ours, regularizers=full()[2:]), torch.optim.AdamW(race.theirs)
    race.step(ours, theirs)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    race.step(ours, theirs)
    race.check()


def test_momentum_saved_as_none(Race):
    """As older versions of torch did; the buffer starts as the undamped gradient."""
    race = Race([(5,)])
    make = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}
    ours, theirs = fastreg.SGD(race.ours, **make), torch.optim.SGD(race.theirs, **make)
    for optimizer in (ours, theirs):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: {"momentum_buffer": None}}})
    for _ in range(2):
        race.step(ours, theirs)
    race.check()


def test_missing_components_start_when_loaded(Race):
    """A checkpoint from before the average: it starts as the weights are then."""
    race = Race([(6,)])
    old = fastreg.AdamW(race.ours)
    race.gradients()
    old.step()
    new = fastreg.AdamW(race.ours, regularizers=[EMA(0.5)])
    new.load_state_dict(old.state_dict())
    before = race.ours[0].detach().clone()
    new.step()
    torch.testing.assert_close(
        new.state[race.ours[0]]["ema"], (before + race.ours[0].detach()) / 2, rtol=0, atol=1e-6
    )
    assert new.state[race.ours[0]]["step"] == 2


def test_loading_copies(rule, Race):
    race = Race()
    optimizer = rule(race.ours, regularizers=[EMA(0.9)])
    race.gradients()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    mine = {t.untyped_storage().data_ptr() for state in optimizer.state.values() for t in state.values()}
    theirs = {t.untyped_storage().data_ptr() for state in saved["state"].values() for t in state.values()}
    assert not mine & theirs
    optimizer.param_groups[0]["lr"] = 5.0
    optimizer.step()
    assert same(saved, kept)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_averages_keep_their_precision(dtype, Race):
    race = Race([(40,)], dtype)
    make = {"lr": 1e-3, "regularizers": [EMA(0.999)]}
    optimizer = fastreg.AdamW(race.ours, **make)
    for _ in range(3):
        race.gradients()
        optimizer.step()
    average = optimizer.state[race.ours[0]]["ema"]
    assert average.dtype == torch.float32 and not torch.equal(average, average.to(dtype).float())
    other = fastreg.AdamW(race.ours, **make)
    other.load_state_dict(through_disk(optimizer.state_dict()))
    assert other.state[race.ours[0]]["ema"].dtype == torch.float32
    assert torch.equal(other.state[race.ours[0]]["ema"], average)
    assert other.state[race.ours[0]]["exp_avg"].dtype == dtype


def test_load_hooks_see_and_change_what_is_loaded(Race):
    race = Race([(5,)], torch.bfloat16)
    optimizer, seen = fastreg.AdamW(race.ours, regularizers=[EMA(0.9)]), []
    race.gradients()
    optimizer.step()
    (p,) = race.ours

    def before(optimizer, state_dict):
        seen.append("before")
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0]["ema"].fill_(1 / 3)
        return state_dict

    def after(optimizer):
        seen.append("after")
        assert torch.equal(optimizer.state[p]["ema"], torch.full((5,), 1 / 3))  # not rounded to bfloat16
        optimizer.state[p]["ema"].fill_(4)
        optimizer.state[p]["exp_avg"].fill_(5)

    optimizer.register_load_state_dict_post_hook(after)
    optimizer.register_load_state_dict_pre_hook(before)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert seen == ["before", "after"]
    assert (optimizer.state[p]["ema"] == 4).all() and (optimizer.state[p]["exp_avg"] == 5).all()
    optimizer.load_state_dict(saved)
    assert seen == ["before", "after"] * 2


def test_save_hooks(rule, Race):
    race, seen = Race(), []
    optimizer = rule(race.ours)
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before"))
    optimizer.register_state_dict_post_hook(lambda o, state_dict: seen.append("after"))
    optimizer.state_dict()
    assert seen == ["before", "after"]


def test_refused_dict_changes_nothing(rule, Race):
    race = Race()
    optimizer = rule(race.ours, regularizers=full())
    race.gradients()
    optimizer.step()
    kept = copy.deepcopy(optimizer.state_dict())
    good = copy.deepcopy(kept)
    good["param_groups"][0]["lr"] = 99.0
    good["state"][0]["step"] += 5
    for change, message in (
        ({"decay": "cautios"}, "got 'cautios'"),
        ({"params": [0]}, "doesn't match the size"),
    ):
        bad = copy.deepcopy(good)
        bad["param_groups"][0].update(change)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
        assert same(optimizer.state_dict(), kept)
    race.gradients()
    optimizer.step()
    assert optimizer.state[race.ours[0]]["step"] == 2


def replaced(state):
    for name, value in state.items():
        state[name] = value.clone()


def away_and_back(state):
    for name, value in state.items():
        state[name] = value.to("meta")
    for name, value in state.items():
        state[name] = torch.ones(value.shape)


def permuted(state):
    for name, value in state.items():
        if value.dim() > 1:
            state[name] = value.t().contiguous().t()


def rewritten(state):
    for name, value in state.items():
        if name != "step":
            value.fill_(0.5)


def recounted(state):
    if "step" in state:
        state["step"] = torch.tensor(7.0)


def counted_in_place(state):
    if "step" in state:
        state["step"].fill_(7)


CHANGES = (dict.clear, replaced, away_and_back, permuted, rewritten, recounted, counted_in_place)


@pytest.mark.parametrize("rule", ("adamw", "nesterov"), indirect=True)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_state_is_picked_up(rule, backend, change, Race):
    race = Race([(9,), (4, 6)])
    ours, theirs = rule(race.ours), rule.oracle(race.theirs)
    for _ in range(2):
        race.step(ours, theirs)
    for optimizer in (ours, theirs):
        for state in optimizer.state.values():
            change(state)
    for _ in range(2):
        race.step(ours, theirs)
    race.check()


def test_cleared_state(rule, Race):
    race = Race()
    ours, theirs = rule(race.ours), rule.oracle(race.theirs)
    for _ in range(2):
        race.step(ours, theirs)
        ours.state.clear()
        theirs.state.clear()
    race.step(ours, theirs)
    race.check()
    assert ours.state[race.ours[0]]["step"] == 1


WRONG = {
    "smaller": lambda t: torch.zeros(3),
    "part of it": lambda t: t[:1],  # at the same address
    "elsewhere": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("others_start_anew", (False, True))
@pytest.mark.parametrize("wrong", WRONG)
def test_state_that_does_not_fit(backend, wrong, others_start_anew, Race):
    """It is refused, with nothing changed; once it fits again, training goes on."""
    race = Race([(5,), (9,), (2, 2)])
    ours, theirs = fastreg.AdamW(race.ours), torch.optim.AdamW(race.theirs)
    race.step(ours, theirs)
    state = ours.state[race.ours[1]]
    kept, state["exp_avg"] = state["exp_avg"], WRONG[wrong](state["exp_avg"])
    if others_start_anew:
        del ours.state[race.ours[0]], theirs.state[race.theirs[0]]
    race.gradients()
    before = [p.detach().clone() for p in race.ours]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'exp_avg' has shape \(.*\) on .*, its parameter \(9,\)"):
            ours.step()
    assert all(map(torch.equal, race.ours, before))
    state["exp_avg"] = kept
    ours.step()
    theirs.step()
    race.step(ours, theirs)
    race.check()
    assert [int(ours.state[p]["step"]) for p in race.ours] == [2 if others_start_anew else 3, 3, 3]


def test_state_loaded_for_other_shapes(Race):
    race, other = Race([(5,)]), Race([(4,)])
    source, target = fastreg.AdamW(other.ours), fastreg.AdamW(race.ours)
    other.gradients()
    source.step()
    target.load_state_dict(source.state_dict())
    race.gradients()
    with pytest.raises(RuntimeError, match=r"shape \(4,\).*parameter \(5,\)"):
        target.step()


def test_seed(Race):
    race = Race()
    noisy = {"regularizers": [GradientNoise(0.1)]}
    generator = torch.get_rng_state()
    plain, one, other = (
        fastreg.SGD(race.ours),
        fastreg.SGD(race.ours, **noisy),
        fastreg.SGD([{"params": race.ours[:1]}, {"params": race.ours[1:]}], **noisy),
    )
    assert torch.equal(torch.get_rng_state(), generator)
    assert "seed" not in plain.param_groups[0]
    assert one.seed != other.seed
    assert [group["seed"] for group in other.param_groups] == [other.seed] * 2
    other.add_param_group({"params": Parameter(torch.ones(1))})
    assert other.param_groups[2]["seed"] == other.seed
