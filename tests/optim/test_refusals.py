"""What cannot work is refused at once, with the value, the range and the way out."""

import math
import re

import pytest
import torch
from torch.nn import Parameter

import fastreg
from fastreg import (
    EMA,
    L1,
    L2SP,
    SAM,
    SGD,
    Adam,
    AdamW,
    AdaptiveClip,
    ClipNorm,
    ClipValue,
    GradientNoise,
    Lion,
    SlowWeights,
    WeightNoise,
)
from fastreg.engine.component import Component
from fastreg.engine.stage import Buffer, Stage
from fastreg.optim.fused_optimizer import FusedOptimizer
from fastreg.optim.rules import Lion as Rule

VALUES = (
    (AdamW, {"lr": -0.1}, "Invalid learning rate: -0.1, must be >= 0"),
    (AdamW, {"lr": math.nan}, "Invalid learning rate: nan, must be >= 0"),
    (AdamW, {"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element, got lr=tensor([0.1000, 0.2000])"),
    (AdamW, {"eps": -1.0}, "Invalid epsilon value: -1.0, must be >= 0"),
    (AdamW, {"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0, must be in [0, 1)"),
    (AdamW, {"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1, must be in [0, 1)"),
    (
        Adam,
        {"betas": (0.9, torch.tensor(0.5))},
        "betas must be either both floats or both Tensors, got betas=(0.9, tensor(0.5000))",
    ),
    (AdamW, {"weight_decay": -1}, "Invalid weight_decay value: -1, must be >= 0"),
    (SGD, {"lr": -0.1}, "Invalid learning rate: -0.1, must be >= 0"),
    (SGD, {"momentum": -0.5}, "Invalid momentum value: -0.5, must be >= 0"),
    (SGD, {"weight_decay": -0.5}, "Invalid weight_decay value: -0.5, must be >= 0"),
    *(
        (
            SGD,
            {"nesterov": True, "momentum": momentum, "dampening": dampening},
            "Nesterov momentum requires a momentum and zero dampening, "
            f"got momentum={momentum}, dampening={dampening}",
        )
        for momentum, dampening in ((0, 0), (0.9, 0.1))
    ),
    (SGD, {"decay": "cautios"}, "must be one of 'l2', 'decoupled', 'independent', 'cautious', got 'cautios'"),
    *(
        (optimizer, options, message)
        for optimizer in (Adam, AdamW, SGD, Lion)
        for options, message in (
            ({"bf16": "kahan"}, "bf16 must be one of 'stochastic', 'remainder', 'nearest', got 'kahan'"),
            ({"state_dtype": torch.int8}, "state_dtype must be a floating-point dtype, got torch.int8"),
            ({"nonfinite": "ignore"}, "must be one of 'propagate', 'skip', 'raise', got 'ignore'"),
            (
                {"regularizers": [ClipNorm(1.0, math.inf), GradientNoise(0.1, relative=True)]},
                "needs the L2 norm, but ClipNorm(max_norm=1.0, norm_type=inf",
            ),
        )
    ),
    (Lion, {"lr": -0.1}, "lr must be >= 0, got lr=-0.1"),
    (Lion, {"lr": math.nan}, "lr must be >= 0, got lr=nan"),
    (Lion, {"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
    (Lion, {"betas": (1.0, 0.9)}, "betas must be two numbers in [0, 1), got betas=(1.0, 0.9)"),
    (Lion, {"betas": (0.9, math.nan)}, "betas must be two numbers in [0, 1), got betas=(0.9, nan)"),
    (Lion, {"betas": (0.9,)}, "betas must be two numbers in [0, 1), got betas=(0.9,)"),
    (Lion, {"weight_decay": math.inf}, "weight_decay must be finite and >= 0, got weight_decay=inf"),
    (Lion, {"weight_decay": -0.1}, "weight_decay must be finite and >= 0, got weight_decay=-0.1"),
    *(
        (optimizer, {"seed": seed}, f"seed must be a whole number >= {-(2**63)}, got seed={seed!r}")
        for optimizer in (AdamW, SGD, Lion)
        for seed in (-(2**63) - 1, 2.5, "a", True)
    ),
    *(
        (optimizer, {"seed": 2**64}, f"seed must fit in 64 bits, got seed={2**64}")
        for optimizer in (AdamW, SGD, Lion)
    ),
)


@pytest.mark.parametrize("optimizer, options, message", VALUES)
def test_values(optimizer, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer([Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("optimizer", (AdamW, SGD, Lion))
def test_extreme_values_that_are_allowed(optimizer):
    weight = Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer([weight], lr=0, weight_decay=0, seed=2**64 - 1).step()
    assert torch.equal(weight, torch.ones(2))


PIECES = (
    *(
        (lambda value=value: ClipNorm(value), f"max_norm must be > 0, got max_norm={value}")
        for value in (0.0, -1.0, math.nan)
    ),
    (lambda: Buffer("q", init="ones"), "init must be one of 'zeros', 'parameter', got 'ones'"),
    (lambda: ClipNorm(1.0, "a"), "norm_type must be 2 or math.inf, got norm_type='a'"),
    (lambda: ClipNorm(1.0, norm_type=1), "norm_type must be 2 or math.inf, got norm_type=1"),
    *(
        (lambda make=make, value=value: make(value), f"{name} must be finite and >= 0, got {name}={value}")
        for make, name in (
            (ClipValue, "clip_value"),
            (GradientNoise, "std"),
            (L2SP, "strength"),
            (L1, "strength"),
        )
        for value in (-0.1, math.inf, math.nan)
    ),
    (lambda: AdaptiveClip(0.0), "clipping must be finite and > 0, got clipping=0.0"),
    (lambda: AdaptiveClip(0.1, eps=-1.0), "eps must be finite and > 0, got eps=-1.0"),
    (lambda: GradientNoise(0.1, gamma=-1.0), "gamma must be finite and >= 0, got gamma=-1.0"),
    (lambda: EMA(1.0), "decay must be in [0, 1), got decay=1.0"),
    (lambda: EMA(-0.1), "decay must be in [0, 1), got decay=-0.1"),
    (lambda: EMA(math.nan), "decay must be in [0, 1), got decay=nan"),
)


@pytest.mark.parametrize("make, message", PIECES)
def test_components(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_components_show_as_written():
    for component in (
        ClipNorm(1),
        ClipValue(2),
        GradientNoise(0.5, 0.55, True),
        GradientNoise(0.5, relative=True),
        EMA(0.9, "slow"),
        L1(0.1),
        L2SP(3),
    ):
        again = eval(repr(component), vars(fastreg))
        assert repr(again) == repr(component) and type(again) is type(component)
    assert repr(GradientNoise(1.0, 2.0, True)) == "GradientNoise(std=1.0, gamma=2.0, relative=True)"
    assert repr(EMA(0.9, "slow")) == "EMA(decay=0.9, name='slow')"


def test_arguments_of_another_type():
    for make, message in (
        (lambda: EMA(buffers=torch.nn.BatchNorm1d(2)), "buffers must hold tensors, such as model.buffers()"),
        (lambda: L2SP(0.1, torch.nn.Linear(1, 1)), "towards must hold tensors, such as model.parameters()"),
        (lambda: L2SP(0.1, torch.ones(2)), "towards must hold tensors, such as model.parameters()"),
        (lambda: ClipNorm(1.0, error_if_nonfinite="no"), "error_if_nonfinite must be True or False, got"),
        (lambda: GradientNoise(0.1, relative="no"), "relative must be True or False, got relative='no'"),
        (lambda: EMA(name=3), "name must be a string, got name=3"),
        (lambda: Lion([Parameter(torch.ones(2))], lr=True), "lr must be a number, got lr=True"),
        (lambda: SlowWeights(name=3), "name must be a string, got name=3"),
        *(
            (
                lambda flag=flag: SAM([Parameter(torch.ones(2))], SGD, lr=0.1, **{flag: "no"}),
                f"{flag} must be",
            )
            for flag in ("adaptive", "sync_perturbation")
        ),
        (lambda: WeightNoise([Parameter(torch.ones(2))], 0.1, "no"), "relative must be True or False"),
        (lambda: type("Old", (Component,), {"words": None}), "by old names: {'words': 'rng_keys'}"),
    ):
        with pytest.raises(TypeError, match=re.escape(message)):
            make()


@pytest.mark.parametrize("thing", (1.0, ClipNorm, "ema", torch.nn.Dropout()))
def test_not_a_piece(rule, thing):
    with pytest.raises(TypeError, match=r"must be components such as fastreg\.ClipNorm\(1\.0\), got"):
        rule([Parameter(torch.ones(1))], regularizers=[thing])
    with pytest.raises(TypeError, match="a list of components, got L1"):
        rule([Parameter(torch.ones(1))], regularizers=L1(0.1))


@pytest.mark.parametrize("optimizer", (Adam, AdamW, SGD, Lion))
def test_differentiable_is_refused(optimizer):
    name = optimizer.__name__
    weights = [Parameter(torch.ones(2)) for _ in range(2)]
    refusal = pytest.raises(ValueError, match=f"differentiable=True is not supported by fastreg.{name}")
    with refusal:
        optimizer(weights, differentiable=True)
    with refusal:
        optimizer([{"params": weights[0]}, {"params": weights[1], "differentiable": True}])
    made = optimizer(weights[:1])
    with refusal:
        made.add_param_group({"params": weights[1], "differentiable": True})
    assert len(made.param_groups) == 1
    with pytest.raises(RuntimeError, match="`fused` does not support `differentiable`"):
        optimizer(weights, differentiable=True, fused=True)
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        optimizer(weights, foreach=True, fused=True)


def test_what_torch_refuses(rule):
    weight = Parameter(torch.ones(2))
    for params, error, message in (
        ([], ValueError, "empty parameter list"),
        (weight, TypeError, "should be an iterable of Tensors or dicts"),
        ([weight * 2], ValueError, "can't optimize a non-leaf Tensor"),
        ([{"params": [weight]}, {"params": [weight]}], ValueError, "more than one parameter group"),
        ([("name", weight), Parameter(torch.ones(1))], ValueError, "with/without names"),
    ):
        with pytest.raises(error, match=message):
            rule(params)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        rule([weight, weight])


def test_two_components_that_store_weights():
    class Stored(fastreg.Component):
        phase = fastreg.Phase.AVERAGE

        def storage(self, group, dtype):
            from fastreg.engine.stage import PLAIN

            return PLAIN

    class AlsoStored(Stored):
        pass

    weight = Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="only one component may say how weights are stored"):
        SGD([weight], regularizers=[Stored(), AlsoStored()])


def test_an_option_set_later_is_refused_at_the_step():
    weight = Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = AdamW([weight])
    for option, value, message in (
        ("differentiable", True, "differentiable=True is not supported"),
        ("decay", "cautios", "got 'cautios'"),
    ):
        optimizer.param_groups[0][option] = value
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        del optimizer.param_groups[0][option]
    assert torch.equal(weight.detach(), torch.ones(3)) and not optimizer.state


def test_what_is_set_later_takes_effect():
    """maximize, amsgrad and the kind of decay are looked up at every step."""
    weight = Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = Adam([weight], weight_decay=0.1)
    optimizer.step()
    down = float(weight[0].detach())
    optimizer.param_groups[0].update(maximize=True, amsgrad=True, decay="decoupled", lr=0.5)
    for _ in range(3):
        optimizer.step()
    assert down < 1 < weight[0] and "max_exp_avg_sq" in optimizer.state[weight]


def doubled(p, u, at, factor):
    return p, u * factor, ()


@pytest.mark.parametrize(
    "declared, returned, message",
    (
        ({"step_scalars": 1}, {"step_scalars": (1.0, 2.0)}, "step_scalars returned 2 .* step_scalars=1"),
        ({"step_scalars": 1}, {}, "step_scalars returned 0 .* declares step_scalars=1"),
        ({"device_scalars": ("size",)}, {}, "device_scalars returned 0 .* device_scalars=1"),
        ({"rng_keys": ("key",)}, {"rng_keys": (1, 2)}, "rng_keys returned 2 .* rng_keys=1"),
    ),
)
@pytest.mark.parametrize("capturable", (False, True))
def test_numbers_that_a_stage_does_not_declare(declared, returned, message, capturable):
    class Doubled(fastreg.Component):
        phase = fastreg.Phase.CLIP
        _stage = Stage("regularizers.scale", doubled, **declared)

    for name, numbers in returned.items():
        setattr(Doubled, name, lambda *_, numbers=numbers: numbers)
    weight = Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = AdamW([weight], capturable=capturable, regularizers=[Doubled()])
    with pytest.raises(TypeError, match=f"Doubled.{message}"):
        optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(2))


def test_a_component_that_is_not_complete():
    with pytest.raises(TypeError, match="doubled must take 3 arguments, got 4: p, u, at, 0 buffers"):
        Stage("regularizers.scale", doubled)
    weight = Parameter(torch.ones(2))
    with pytest.raises(TypeError, match="Component has no phase"):
        SGD([weight], regularizers=[fastreg.Component()])

    class Misspelt(fastreg.Component):
        phase = fastreg.Phase.CLIP
        _stage = Stage("regularizers.double", doubled, step_scalars=1)

        def step_scalars(self, group, step):
            return (2.0,)

    weight.grad = torch.ones(2)
    with fastreg.use_backend("triton"), pytest.raises(ValueError, match="regularizers.py has no 'double'"):
        SGD([weight], regularizers=[Misspelt()]).step()


def test_unknown_options():
    class Plain(FusedOptimizer):
        def __init__(self, params, **options):
            self._init_components(Rule(), "l2", **options)

    with pytest.raises(TypeError, match="Plain has no option 'maximise'"):
        Plain([Parameter(torch.ones(2))], maximise=True)
