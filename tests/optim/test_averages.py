"""Averages of the weights: against torch.optim.swa_utils, and swapped in and out."""

import pytest
import torch
from torch.nn import Parameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastreg
from fastreg import EMA, SGD, ClipNorm, GradientNoise


@pytest.fixture
def trained(Race):
    """An optimizer with two averages, after three steps, and its parameters."""
    race = Race()
    optimizer = SGD(race.ours, lr=0.1, regularizers=[EMA(0.5), EMA(0.9, name="slow")])
    for _ in range(3):
        race.gradients()
        optimizer.step()
    return optimizer, race.ours


@pytest.mark.parametrize("decay", (0.0, 0.999))
def test_ema_equals_torch(rule, backend, decay, Race, close):
    race = Race()
    ours = rule(race.ours, regularizers=[ClipNorm(1e9), EMA(decay)])
    theirs = rule.oracle(race.theirs)
    model = torch.nn.ParameterList(race.theirs)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    average.update_parameters(model)  # the first call copies
    for _ in range(4):
        race.step(ours, theirs)
        average.update_parameters(model)
    close([ours.state[p]["ema"] for p in race.ours], list(average.parameters()))


def test_closed_form(backend, close):
    """Constant steps of -1 from 0: average_t = -(t - β(1 - βᵗ)/(1 - β))."""
    weight, decay, steps = Parameter(torch.zeros(4, dtype=torch.float64)), 0.75, 9
    optimizer = SGD([weight], lr=1.0, regularizers=[EMA(decay)])
    weight.grad = torch.ones_like(weight)
    for _ in range(steps):
        optimizer.step()
    expected = -(steps - decay * (1 - decay**steps) / (1 - decay))
    close(optimizer.state[weight]["ema"], torch.full_like(weight, expected))


def test_an_average_starts_when_its_parameter_does(Race):
    race = Race([(3,), (4,)])
    optimizer = SGD(race.ours, lr=0.1, regularizers=[EMA(0.5)])
    start = race.ours[1].detach().clone()
    race.gradients(1)
    optimizer.step()
    with optimizer.averaged():
        assert torch.equal(race.ours[1], start)
    race.gradients()
    optimizer.step()
    expected = (start + race.ours[1].detach()) / 2
    torch.testing.assert_close(optimizer.state[race.ours[1]]["ema"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name, key", ((None, "ema"), ("ema", "ema"), ("slow", "slow")))
def test_swapped_in_and_back(trained, name, key):
    optimizer, parameters = trained
    before = [p.detach().clone() for p in parameters]
    addresses = [p.data_ptr() for p in parameters]
    with optimizer.averaged(name) as inside:
        assert inside is None
        for p in parameters:
            assert torch.equal(p, optimizer.state[p][key])
    assert all(map(torch.equal, parameters, before))
    with pytest.raises(ZeroDivisionError), optimizer.averaged(name):
        1 / 0  # noqa: B018
    assert all(map(torch.equal, parameters, before))
    assert [p.data_ptr() for p in parameters] == addresses
    optimizer.step()
    assert not any(map(torch.equal, parameters, before))


def test_the_averages_differ(trained):
    optimizer, parameters = trained
    assert not any(torch.equal(optimizer.state[p]["ema"], optimizer.state[p]["slow"]) for p in parameters)


@pytest.mark.parametrize("inner", (None, "slow"))
def test_not_nested(trained, inner):
    optimizer, parameters = trained
    before = [p.detach().clone() for p in parameters]
    with optimizer.averaged():
        with pytest.raises(RuntimeError, match="swapped in already"), optimizer.averaged(inner):
            pass
        assert torch.equal(parameters[0], optimizer.state[parameters[0]]["ema"])
    assert all(map(torch.equal, parameters, before))


def test_no_step_inside(trained):
    optimizer, parameters = trained
    before = [p.detach().clone() for p in parameters]
    with optimizer.averaged():
        with pytest.raises(RuntimeError, match="inside `with optimizer.averaged"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="inside `with optimizer.averaged"):
            optimizer.load_state_dict(optimizer.state_dict())
        with pytest.raises(RuntimeError, match="inside `with optimizer.averaged"):
            optimizer.step()
    assert all(map(torch.equal, parameters, before))


def test_saved_averages_swap_in_after_loading(trained):
    optimizer, parameters = trained
    fresh = [Parameter(p.detach().clone()) for p in parameters]
    other = SGD(fresh, lr=0.1, regularizers=[EMA(0.5), EMA(0.9, name="slow")])
    other.load_state_dict(optimizer.state_dict())
    with other.averaged("slow"):
        assert all(torch.equal(q, optimizer.state[p]["slow"]) for p, q in zip(parameters, fresh, strict=True))


def test_unknown_average(trained):
    optimizer, parameters = trained
    with pytest.raises(ValueError, match="'fast', only 'ema', 'slow'"), optimizer.averaged("fast"):
        pass
    plain = SGD(parameters, lr=0.1)
    for name in (None, "ema"):
        with pytest.raises(ValueError, match=r"regularizers=\[fastreg.EMA"), plain.averaged(name):
            pass


def test_order_of_regularizers_does_not_matter(rule, Race):
    pieces = (lambda: ClipNorm(1.0), lambda: GradientNoise(0.1), lambda: EMA(0.9))
    results = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        race = Race()
        optimizer = rule(race.ours, regularizers=[pieces[i]() for i in order], seed=1)
        for _ in range(3):
            race.gradients()
            optimizer.step()
        results.append([t for p in race.ours for t in (p.detach(), optimizer.state[p]["ema"])])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


DUPLICATES = {
    "clip": ([ClipNorm(1.0), ClipNorm(2.0)], "'ClipNorm' is given more than once"),
    "noise": ([GradientNoise(0.1), GradientNoise(0.1)], "'GradientNoise' is given more than once"),
    "average": ([EMA(0.9), EMA(0.99)], "'ema' is given more than once.*name="),
    "named averages": ([EMA(0.9, "a"), EMA(0.99, "a")], "'a' is given more than once"),
    "the rule's state": ([EMA(0.9, "exp_avg")], "'exp_avg'.*name"),
    "the step count": ([EMA(0.9, "step")], "'step'.*name"),
}


@pytest.mark.parametrize("case", DUPLICATES)
def test_duplicates(case):
    regularizers, message = DUPLICATES[case]
    with pytest.raises(ValueError, match=message):
        fastreg.AdamW([Parameter(torch.ones(1))], regularizers=regularizers)
