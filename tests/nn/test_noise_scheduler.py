"""Levels of noise that follow a schedule."""

import pytest
from torch import nn

import fastreg
from fastreg.nn import InputNoise, NoiseScheduler, TokenNoise, attach_activation_noise
from fastreg.schedules import Linear


def test_levels_follow_a_schedule():
    model = nn.Sequential(InputNoise(0.4), nn.Linear(4, 4), TokenNoise(0.2, 10))
    weights = fastreg.WeightNoise(
        [{"params": [model[1].weight]}, {"params": [model[1].bias], "std": 0.1}], 0.8
    )
    attached = attach_activation_noise(model, "1", 1.0)
    scheduler = NoiseScheduler([model, weights, attached], Linear(1.0, steps=4))

    def levels():
        return [
            model[0].std, model[2].rate, *(group["std"] for group in weights.param_groups), attached.std,
        ]  # fmt: skip

    bases = [0.4, 0.2, 0.8, 0.1, 1.0]
    for step in range(6):
        assert levels() == pytest.approx([base * max(0, 1 - step / 4) for base in bases])
        assert scheduler.get_last_level() == levels() and scheduler.last_step == step
        scheduler.step()
    scheduler.step(1)
    saved = scheduler.state_dict()
    scheduler.step()
    resumed = NoiseScheduler([model, weights, attached], Linear(1.0, steps=4))  # levels are those of step 2
    resumed.load_state_dict(saved)
    assert levels() == pytest.approx([base * 0.75 for base in bases]) and resumed.last_step == 1


def test_attributes_of_a_model_are_no_levels():
    model = nn.Sequential(InputNoise(0.4))
    model.alpha, model.std = 0.7, 0.5
    NoiseScheduler(model, lambda step: 0.5)
    assert (model[0].std, model.alpha, model.std) == (0.2, 0.7, 0.5)


def test_schedules_refuse():
    with pytest.raises(TypeError, match="Linear has no level of noise"):
        NoiseScheduler(nn.Linear(3, 3), Linear(1.0, steps=4))
    with pytest.raises(TypeError, match="factor must be a function"):
        NoiseScheduler(InputNoise(0.1), 0.5)
    module = InputNoise(0.4)
    with pytest.raises(ValueError, match="factor at step 1 must be finite and >= 0, got -1"):
        NoiseScheduler(module, lambda step: 1 - 2 * step).step()
    assert module.std == 0.4
    with pytest.raises(ValueError, match="step must be a whole number >= 0, got step=1.5"):
        NoiseScheduler(module, lambda step: step + 1).step(1.5)
    tokens = TokenNoise(0.4, 10)
    with pytest.raises(ValueError, match=r"rate at step 3 must be in \[0, 1\]"):
        NoiseScheduler([module, tokens], lambda step: 1 + step).step(3)
    assert (module.std, tokens.rate) == (0.4, 0.4)
