"""Schedules against closed forms, and against the arrays of those who published them."""

import copy
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastreg.schedules import (
    Constant,
    Cosine,
    DropPathLayers,
    Early,
    Late,
    Linear,
    LinearLayers,
    Piecewise,
    layer_rate,
)

POINTS = ((10, 0.0), (20, 0.4), (40, 0.1))
SCHEDULES = (
    Constant(0.1), Linear(0.3, steps=10), Linear(0.1, 0.4, 7), Cosine(0.3, 0.1, 10), Early(0.2, 5),
    Early(0.2, 5, "linear"), Late(0.2, 5), Piecewise(POINTS), Piecewise(POINTS, "linear"),
)  # fmt: skip
rates = st.floats(0, 1)


def drop_scheduler(drop_rate, epochs, niter_per_ep, cutoff_epoch, mode, schedule="constant"):
    """As in github.com/facebookresearch/dropout, which goes with the paper."""
    early, late = cutoff_epoch * niter_per_ep, (epochs - cutoff_epoch) * niter_per_ep
    if mode == "early":
        first = np.full(early, drop_rate) if schedule == "constant" else np.linspace(drop_rate, 0, early)
        return np.concatenate((first, np.full(late, 0)))
    return np.concatenate((np.full(early, 0), np.full(late, drop_rate)))


@pytest.mark.parametrize("niter", (1, 5))
@pytest.mark.parametrize("cutoff", (1, 3))
@pytest.mark.parametrize("mode", ("early constant", "early linear", "late"))
def test_early_and_late_dropout_are_as_published(mode, cutoff, niter):
    expected = drop_scheduler(0.3, 6, niter, cutoff, *mode.split())
    kind = mode.split()[1:]
    schedule = (Late if mode == "late" else Early)(0.3, cutoff * niter, *kind)
    ours = np.array([schedule(step) for step in range(len(expected))])
    # linspace multiplies by a rounded step width: a rounding or two of the rate.
    assert np.abs(ours - expected).max() <= 4 * np.finfo(float).eps * 0.3
    assert schedule(10**9) == (0.3 if mode == "late" else 0.0)


@given(start=rates, steps=st.integers(1, 1000), step=st.integers(0, 2000))
def test_linear_decrease_is_its_formula(start, steps, step):
    expected = start * (1 - step / steps) if step < steps else 0.0
    assert Linear(start, steps=steps)(step) == expected


@given(start=rates, end=rates, steps=st.integers(1, 1000), step=st.integers(0, 2000))
def test_cosine_is_its_formula(start, end, steps, step):
    time = min(step, steps) / steps
    expected = end + (start - end) * (1 + math.cos(math.pi * time)) / 2
    assert Cosine(start, end, steps)(step) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("kind", (Linear, Cosine))
@given(start=rates, end=rates)
def test_start_and_end_are_met_exactly(kind, start, end):
    schedule = kind(start, end, 10)
    assert schedule(0) == start and schedule(10) == schedule(11) == end


def test_piecewise():
    constant, linear = Piecewise(POINTS), Piecewise(POINTS, "linear")
    assert [constant(t) for t in (0, 10, 19, 20, 39, 40, 99)] == [0, 0, 0, 0.4, 0.4, 0.1, 0.1]
    for t in (0, 10, 13, 20, 30, 35, 40, 99):
        assert linear(t) == pytest.approx(np.interp(t, *zip(*POINTS, strict=True)), abs=1e-15)
    assert Piecewise([[0, 0.1]]) == Piecewise(((0, 0.1),)) and hash(Piecewise([[0, 0.1]]))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedules_are_pure_bounded_and_picklable(schedule):
    values = [schedule(step) for step in range(60)]
    assert values == [schedule(step) for step in range(60)]
    assert schedule.bounds == (min(values), max(values))
    assert pickle.loads(pickle.dumps(schedule)) == copy.deepcopy(schedule) == schedule
    assert eval(repr(schedule)) == schedule
    with pytest.raises(AttributeError):
        schedule.rate = 0.0
    with pytest.raises(ValueError, match="step must be a whole number >= 0, got step=-1"):
        schedule(-1)


@given(base=rates, last=rates, layers=st.integers(1, 50))
def test_linear_layers(base, last, layers):
    increase = (last - base) / max(layers - 1, 1) * 0.999
    for layer in range(layers):
        assert layer_rate(LinearLayers(base, increase), layer, layers) == base + layer * increase


@pytest.mark.parametrize("layers", (1, 2, 12))
def test_drop_path_layers_are_timms(layers):
    expected = np.linspace(0, 0.2, layers)
    ours = [layer_rate(DropPathLayers(0.2), layer, layers) for layer in range(layers)]
    assert np.abs(ours - expected).max() <= 4 * np.finfo(float).eps * 0.2


def test_what_a_rate_over_layers_may_be():
    assert layer_rate(0.1, 3, 4) == layer_rate([0, 0, 0, 0.1], 3, 4) == 0.1
    assert layer_rate(lambda layer: layer / 10, 3, 4) == 0.3
    assert layer_rate(lambda layer, layers: layer / layers, 3, 4) == 0.75


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: Constant(1.5), r"rate must be in \[0, 1\], got rate=1.5"),
        (lambda: Constant(float("nan")), r"rate must be in \[0, 1\], got rate=nan"),
        (lambda: Constant(True), r"rate must be a number, got rate=True"),
        (lambda: Linear(-0.1, steps=5), r"start must be in \[0, 1\], got start=-0.1"),
        (lambda: Linear(0.1, 2, steps=5), r"end must be in \[0, 1\], got end=2"),
        (lambda: Linear(0.1), "Linear needs steps=, the step from which the rate is `end`"),
        (lambda: Cosine(0.1, steps=-1), "steps must be a whole number >= 1, got steps=-1"),
        (lambda: Early(0.1, 0), "cutoff must be a whole number >= 1, got cutoff=0"),
        (lambda: Early(0.1, 5, "cosine"), "kind must be one of 'constant', 'linear', got 'cosine'"),
        (lambda: Late("0.1", 5), r"rate must be a number, got rate='0.1'"),
        (lambda: Piecewise(()), "points must be .step, rate. with growing steps >= 0"),
        (lambda: Piecewise(((1, 0.1), (1, 0.2))), "growing steps"),
        (lambda: Piecewise(((-1, 0.1),)), "step of a point must be a whole number >= 0, got -1"),
        (lambda: Piecewise(((1.5, 0.1),)), "step of a point must be a whole number >= 0, got 1.5"),
        (lambda: Constant(0.1)("a"), "step must be a whole number >= 0, got step='a'"),
        (lambda: Piecewise(((3, 1.1),)), r"rate at step 3 must be in \[0, 1\], got 1.1"),
        (lambda: LinearLayers(1.1), r"base must be in \[0, 1\], got base=1.1"),
        (lambda: LinearLayers(0.1, 2), r"increase must be in \[-1, 1\], got increase=2"),
        (lambda: LinearLayers(0.1, 0.1)(0, 11), "give 1.1 at layer 10; .* between -0.01 and 0.09"),
        (lambda: LinearLayers(0.1, -0.1)(0, 3), "give -0.1 at layer 2"),
        (lambda: DropPathLayers(2), r"rate must be in \[0, 1\], got rate=2"),
        (lambda: layer_rate([0.1, 0.2], 0, 3), "got 2 rates for 3 layers: give one for each"),
        (lambda: layer_rate(lambda i: 1 + i, 1, 3), r"rate of layer 1 must be in \[0, 1\], got 2"),
        (lambda: layer_rate(7, 0, 3), r"rate must be in \[0, 1\], got rate=7"),
    ),
)  # fmt: skip
def test_errors_show_value_and_range(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_numbers_are_kept_as_floats_and_ints():
    schedule = Linear(np.float32(0.5), steps=3.0)
    assert type(schedule.start) is float and type(schedule.steps) is int
    assert schedule == Linear(0.5, 0, 3)


def test_a_function_of_the_step_is_none_of_the_layer():
    with pytest.raises(
        TypeError, match="function of the step, not of the layer: give it to DropoutScheduler"
    ):
        layer_rate(Linear(0.1, steps=5), 0, 3)
