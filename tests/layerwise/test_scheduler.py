"""Rates over time: right at each step, of few values where each costs a compilation, resumed exactly."""

import copy

import pytest
import torch

from fastreg.layerwise import DropoutScheduler, assert_dropout, remove, restore, set_dropout
from fastreg.schedules import Constant, Cosine, Early, Linear, LinearLayers


def rates(model):
    return [block.mlp.dropout.p for block in model.transformer.h]


def test_every_step_has_its_rate(make):
    model, schedule = make("gpt2"), Linear(0.3, 0.1, 8)
    scheduler = DropoutScheduler(model, schedule)
    for step in range(12):
        assert scheduler.last_step == step
        assert rates(model) == [schedule(step)] * 3
        assert set(scheduler.get_last_rate().values()) == {schedule(step)} and len(scheduler.table) == 6
        scheduler.step()
    scheduler.step(3)
    assert rates(model) == [schedule(3)] * 3 and scheduler.last_step == 3
    assert_dropout(model, scheduler.table)


def test_a_factor_over_time_times_rates_over_layers(make):
    model, times, layers = make("llama"), Cosine(1.0, 0.0, 10), LinearLayers(0.1, 0.1)
    scheduler = DropoutScheduler(model, times, layers=layers, inject=True)
    for step in range(11):
        scheduler.step(step)
        rates = [block.mlp.fastreg_dropout.p for block in model.model.layers]
        assert rates == [times(step) * layers(i, 3) for i in range(3)]
    assert rates == [0, 0, 0]
    with pytest.raises(ValueError, match="layers has rates for .'attention',., the schedule for .'hidden',."):
        DropoutScheduler(model, times, layers={"attention": 0.1})


def test_schedules_by_role(make):
    model = make("gpt2")
    scheduler = DropoutScheduler(
        model,
        {"hidden": Early(1.0, 4), "embedding": 0.5},
        layers={"hidden": [0.1, 0.2, 0.3], "embedding": 0.1},
    )
    assert rates(model) == [0.1, 0.2, 0.3] and model.transformer.drop.p == 0.05
    scheduler.step(4)
    assert rates(model) == [0, 0, 0] and model.transformer.drop.p == 0.05


@pytest.mark.parametrize(
    ("name", "role"), (("gpt2", "attention"), ("llama", "attention"), ("bart", "hidden"))
)
def test_python_floats_take_few_values(make, name, role):
    schedule = Linear(0.3, 0.1, 100)
    scheduler = DropoutScheduler(make(name), schedule, role, layers=LinearLayers(0.5, 0.1))
    seen = []
    for step in range(120):
        scheduler.step(step)
        seen.append(tuple(scheduler.get_last_rate().values()))
        for row in scheduler.table:
            # No further off than half of the distance of two levels.
            assert abs(row.rate / (0.5 + 0.1 * row.layer) - schedule(step)) <= 0.2 / 6 / 2 * (1 + 1e-12)
    assert len(set(seen)) == 7
    assert seen[0] == tuple(0.3 * (0.5 + 0.1 * row.layer) for row in scheduler.table)
    assert seen[-1] == tuple(0.1 * (0.5 + 0.1 * row.layer) for row in scheduler.table)
    exact = DropoutScheduler(make(name), schedule, role, levels=None)
    exact.step(37)
    assert set(exact.get_last_rate().values()) == {schedule(37)}


def test_functions_without_bounds(make):
    scheduler = DropoutScheduler(make("gpt2"), lambda step: 0.1 / (1 + step))
    scheduler.step()
    assert set(scheduler.get_last_rate().values()) == {0.05}
    with pytest.raises(
        ValueError, match="is a Python float, and torch.compile would .* levels=None; got <function"
    ):
        DropoutScheduler(make("llama"), lambda step: 0.1, "attention")
    DropoutScheduler(make("llama"), lambda step: 0.1, "attention", levels=None)


def test_resuming(make, tmp_path):
    model, schedule = make("gpt2"), Linear(0.3, steps=10)
    scheduler = DropoutScheduler(model, schedule)
    for _ in range(4):
        scheduler.step()
    state = scheduler.state_dict()
    assert state == {"last_step": 4}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    restore(loaded)
    assert rates(loaded) == rates(model)
    resumed = DropoutScheduler(loaded, schedule)
    resumed.load_state_dict(state)
    assert resumed.last_step == 4 and resumed.get_last_rate() == scheduler.get_last_rate()
    resumed.step()
    scheduler.step()
    assert rates(loaded) == rates(model) == [schedule(5)] * 3


def test_constants_and_copies(make, run):
    model = make("gpt2")
    expected = run(model, training=True)
    scheduler = DropoutScheduler(model, 0.2)
    copied = copy.deepcopy(scheduler)
    assert isinstance(scheduler.schedules["hidden"], Constant)
    copied.step(5)
    assert rates(copied.model) == rates(model) == [0.2] * 3 and copied.model is not model
    remove(model)
    assert all(map(torch.equal, run(model, training=True), expected))


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"levels": 1}, "levels must be a whole number >= 2, got levels=1"),
        ({"levels": 2.5}, "levels must be a whole number >= 2, got levels=2.5"),
        ({"schedule": 1.5}, r"rate must be in \[0, 1\], got rate=1.5"),
        ({"schedule": lambda step: 3.0}, r"rate at step 0 must be in \[0, 1\], got 3.0"),
        ({"layers": [0.1, 0.2]}, "got 2 rates for 3 layers"),
        ({"roles": "path"}, "has no 'path' dropout"),
        ({"roles": "nose"}, "roles must be among"),
    ),
)  # fmt: skip
def test_errors_change_nothing(make, run, options, message):
    model = make("gpt2")
    before = run(model, training=True)
    with pytest.raises(ValueError, match=message):
        DropoutScheduler(model, **{"schedule": Linear(0.5, steps=3), **options})
    assert all(map(torch.equal, run(model, training=True), before))


def test_a_wrong_step_changes_nothing(make):
    model = make("gpt2")
    scheduler = DropoutScheduler(model, lambda step: 0.5 + 0.3 * step)
    with pytest.raises(ValueError, match="rate at step 2 must be in"):
        scheduler.step(2)
    with pytest.raises(ValueError, match="step must be a whole number >= 0, got step=1.5"):
        scheduler.step(1.5)
    assert rates(model) == [0.5] * 3 and scheduler.last_step == 0


def test_setting_by_hand_between_steps_is_overwritten(make):
    model = make("gpt2")
    scheduler = DropoutScheduler(model, 0.2)
    set_dropout(model, 0.4)
    scheduler.step()
    assert rates(model) == [0.2] * 3
