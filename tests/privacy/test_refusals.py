"""DPOptimizer refuses arguments, optimizers and gradients with which a step would not be private."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import fastreg
from fastreg.privacy import DPOptimizer

from .conftest import backward, batch, network, private, train, weights

pytestmark = pytest.mark.filterwarnings("ignore:noise_seed")


def base(**options):
    return torch.optim.SGD(network().parameters(), lr=0.1, **options)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier must be finite and >= 0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"expected_batch_size": None}, "expected_batch_size must be given"),
        ({"expected_batch_size": 0}, "expected_batch_size must be finite and > 0"),
        ({"loss_reduction": "none"}, "'mean', 'sum'"),
        ({"clipping": "adaptive"}, "'flat', 'per_layer'"),
        ({"accountant": "rdp"}, "sample_rate"),
        ({"sample_rate": 2}, "sample_rate must be in"),
        ({"noise_seed": True}, "noise_seed must be a whole number"),
        ({"noise_seed": 2.5}, "noise_seed must be a whole number"),
        ({"accountant": "gdp", "sample_rate": 0.1}, "too little"),
    ],
    ids=str,
)
def test_values_out_of_range(options, match):
    for model in (None, network()):
        optimizer = base() if model is None else torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=match):
            DPOptimizer(optimizer, **{"model": model, "expected_batch_size": 8, **options})


@pytest.mark.parametrize(
    "options",
    [{"noise_multiplier": True}, {"sample_rate": "a"}, {"reproducible": "no"}, {"materialize_grad": 1},
     {"model": 3}],
    ids=str,
)  # fmt: skip
def test_values_of_another_kind(options):
    model = network()
    with pytest.raises(TypeError, match=f"{next(iter(options))} must be"):
        DPOptimizer(
            fastreg.SGD(model.parameters(), 0.1), **{"model": model, "expected_batch_size": 8} | options
        )
    with pytest.raises(ValueError, match="batch_dim must be a whole number"):
        DPOptimizer(fastreg.SGD(model.parameters(), 0.1), model=model, expected_batch_size=8, batch_dim=True)


def test_dir_has_what_is_imported_later():
    assert "PrivacyEngine" in dir(fastreg.privacy)


def test_clipping_a_batch_is_not_private():
    """The three-argument form of old tutorials: no model, no gradients of samples."""
    model = network()
    optimizer = DPOptimizer(
        torch.optim.SGD(model.named_parameters(), 0.1), noise_multiplier=1.0, max_grad_norm=1.0,
        expected_batch_size=8,
    )  # fmt: skip
    before = weights(model)
    backward(model)
    with pytest.raises(ValueError, match=r"'0.weight'.*not private.*DPOptimizer\(optimizer, model=model"):
        optimizer.step()
    assert all(map(torch.equal, weights(model), before))


def test_bases_whose_steps_are_no_post_processing():
    model = network()
    for optimizer, match in (
        (fastreg.SAM(model.parameters(), torch.optim.SGD, lr=0.1), "another release.*MSAM"),
        (fastreg.AdamW(model.parameters(), regularizers=[fastreg.AdaptiveClip()]), "AdaptiveClip"),
    ):
        with pytest.raises(ValueError, match=match):
            DPOptimizer(optimizer, model=model, expected_batch_size=8)


class Reads(fastreg.Component):
    phase = fastreg.Phase.CLIP

    def prepare(self, plan):
        pass


class ReadsAtTheEnd(fastreg.EMA):
    def finish(self, plan, flags):
        pass


class MixedIn(type("Mixin", (), {"prepare": Reads.prepare}), fastreg.GradientNoise):
    pass


class First(fastreg.ClipValue):
    phase = fastreg.Phase.PRIVACY


class ReadsNone(Reads):
    reads_gradients = False


@pytest.mark.parametrize("make", [Reads, ReadsAtTheEnd, lambda: MixedIn(0.1), lambda: First(1.0)])
def test_components_that_may_read_gradients_without_noise(make):
    model, component = network(), make()
    optimizer = fastreg.SGD(model.parameters(), regularizers=[component])
    with pytest.raises(ValueError, match=f"{type(component).__name__} may read gradients before their noise"):
        DPOptimizer(optimizer, model=model, expected_batch_size=8)


def test_components_that_read_none():
    model = network()
    safe = [
        ReadsNone(), fastreg.ClipNorm(1.0), fastreg.GradientNoise(0.1, relative=True), fastreg.MSAM(),
        fastreg.EMA(0.9), fastreg.SlowWeights(2),
    ]  # fmt: skip
    DPOptimizer(fastreg.Adam(model.parameters(), regularizers=safe), model=model, expected_batch_size=8)


def test_private_twice():
    model, optimizer = private()
    for inner in (optimizer, optimizer.base_optimizer):
        with pytest.raises(ValueError, match="detach"):
            DPOptimizer(inner, model=model, expected_batch_size=8)
    train(model, optimizer)  # which is as it was


def test_parameters_that_nobody_clips():
    model, other = network(), network()
    with pytest.raises(ValueError, match="not one of the model"):
        DPOptimizer(
            torch.optim.SGD([*model.parameters(), *other.parameters()], 0.1),
            model=model,
            expected_batch_size=8,
        )
    with pytest.raises(ValueError, match="'2.weight' is trainable but not in the optimizer"):
        DPOptimizer(torch.optim.SGD(model[0].parameters(), 0.1), model=model, expected_batch_size=8)
    tail = nn.Sequential(network(), nn.PReLU())
    with pytest.raises(ValueError, match="1.weight"):
        optimizer = fastreg.SGD(tail.parameters(), 0.1)
        DPOptimizer(optimizer, model=tail, expected_batch_size=8)
    backward(tail)
    optimizer.step()  # nothing has stuck


def test_gradients_that_were_made_elsewhere():
    model, optimizer = private()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(RuntimeError, match="'0.weight' has not been clipped"):
        optimizer.step()


@pytest.mark.parametrize("make", [fastreg.SGD, torch.optim.SGD])
@pytest.mark.parametrize("options", [{}, {"materialize_grad": True}])
def test_gradients_of_frozen_parameters_are_not_used(make, options):
    """They have no noise: what was left before freezing, by a step at hand or by training without privacy."""
    model = network()
    backward(model)
    model[0].weight.requires_grad_(False)
    before = weights(model)
    model, optimizer = private(model, make, **options)
    with pytest.raises(RuntimeError, match="'0.weight'.* frozen but has a gradient"):
        optimizer.step()
    optimizer.zero_grad()
    backward(model)
    model[2].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="'2.weight'.* frozen but has a gradient"):
        optimizer.step()
    assert all(map(torch.equal, weights(model), before))
    optimizer.zero_grad()
    train(model, optimizer, 1)
    changed = [not torch.equal(*pair) for pair in zip(weights(model), before, strict=True)]
    assert changed == [False, True, False, True]


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_a_bound_that_changes_while_there_are_sums(clipping):
    """Noise for a smaller bound than that of the samples is too little."""
    model, optimizer = private(max_grad_norm=4.0, clipping=clipping)
    before = weights(model)
    backward(model, rows=slice(4))
    optimizer.accumulate()
    optimizer.zero_grad()
    optimizer.max_grad_norm = 0.5
    for _ in range(2):
        with pytest.raises(RuntimeError, match="clipped to 4 before max_grad_norm was changed"):
            optimizer.step()
        backward(model, rows=slice(4, 6))
    assert all(map(torch.equal, weights(model), before))
    optimizer._is_last_step_skipped = False
    optimizer.zero_grad()
    train(model, optimizer)
    optimizer.max_grad_norm = 2.0
    train(model, optimizer)


def test_a_bound_that_changes_while_there_are_sums_of_samples_held():
    model = network()
    optimizer = DPOptimizer(
        fastreg.SGD(model.parameters(), lr=0.1), max_grad_norm=4.0, expected_batch_size=3, noise_seed=3
    )
    for p in model.parameters():
        p.grad_sample = torch.ones(3, *p.shape)
    optimizer.accumulate()
    optimizer.zero_grad()
    optimizer.max_grad_norm = 0.5
    with pytest.raises(RuntimeError, match="clipped to 4 before"):
        optimizer.step()
    optimizer.max_grad_norm = 4.0
    optimizer.step()
    optimizer.zero_grad()
    optimizer.max_grad_norm = 0.5
    optimizer.step()


@pytest.mark.parametrize("wrap", [lambda base: base, fastreg.Lookahead])
@pytest.mark.parametrize("make", [fastreg.SGD, torch.optim.SGD])
def test_steps_of_the_base_alone(make, wrap):
    model, optimizer = private(make=lambda params, lr: wrap(make(params, lr=lr)))
    train(model, optimizer)
    before = weights(model)
    backward(model)
    with pytest.raises(RuntimeError, match="not private"):
        optimizer.base_optimizer.step()
    assert all(map(torch.equal, weights(model), before))
    optimizer.detach()
    backward(model)
    optimizer.base_optimizer.step()


@pytest.mark.parametrize("bound", [math.inf, torch.tensor(-1.0), torch.tensor(math.nan)])
def test_bounds_without_a_scale_of_noise(bound):
    with pytest.raises(ValueError, match="finite and > 0"):
        private(max_grad_norm=bound)
    model, optimizer = private(accountant="rdp", sample_rate=0.1)
    optimizer.max_grad_norm = bound
    with pytest.raises(ValueError, match="finite and > 0"):
        optimizer.step()
    assert not optimizer.accountant.history


def test_a_parameter_that_thaws():
    model = network()
    model[0].requires_grad_(False)
    model, optimizer = private(model)
    model[0].requires_grad_(True)
    with pytest.raises(RuntimeError, match="0.weight"):
        train(model, optimizer, 1)


def test_a_scaler():
    model, optimizer = private()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x, y = batch()
    scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
    with pytest.raises(RuntimeError, match="bfloat16"):
        scaler.step(optimizer)


def test_copies():
    _, optimizer = private()
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            copied(optimizer)
