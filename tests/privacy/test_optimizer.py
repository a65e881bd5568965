"""DPOptimizer: what its step is made of, what it refuses, schedulers, checkpoints and several processes."""

import copy
import datetime
import io
import math
import os
import pickle
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fastreg
from fastreg.privacy import DPOptimizer, PoissonSampler, poisson_loader

pytestmark = pytest.mark.filterwarnings("ignore:noise_seed")

TORCH = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}


def network(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(samples=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 6, generator=generator).to(dtype)
    return x, torch.randint(0, 3, (samples,), generator=generator)


def private(model=None, make=fastreg.AdamW, lr=1e-2, **options):
    model = network() if model is None else model
    settings = {"model": model, "noise_multiplier": 1.0, "expected_batch_size": 8, "noise_seed": 3}
    return model, DPOptimizer(make(model.parameters(), lr=lr), **{**settings, **options})


def backward(model, samples=8, reduction="mean", rows=slice(None)):
    x, y = batch(samples)
    nn.functional.cross_entropy(model(x[rows]), y[rows], reduction=reduction).backward()


def train(model, optimizer, steps=3):
    for _ in range(steps):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


# The step


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", TORCH)
def test_without_clipping_and_noise_it_is_the_base_optimizer(name, reduction, close):
    for make in (getattr(fastreg, name), TORCH[name]):
        plain = network()
        base = TORCH[name](plain.parameters(), lr=1e-2)
        model, optimizer = private(
            make=make, noise_multiplier=0.0, max_grad_norm=1e8, loss_reduction=reduction
        )
        for _ in range(4):
            for net, opt in ((plain, base), (model, optimizer)):
                opt.zero_grad()
                backward(net, reduction=reduction)
                opt.step()
        for a, b in zip(weights(model), weights(plain), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "clipping, bound", [("flat", 0.3), ("per_layer", 0.3), ("per_layer", [0.3, 0.1, 0.2, 0.4])]
)
def test_equals_a_loop_over_samples(clipping, bound, close):
    """One sample at a time, clipped, summed, divided by the expected batch size, not by the actual one."""
    model, optimizer = private(
        make=fastreg.SGD, lr=1.0, noise_multiplier=0.0, clipping=clipping, max_grad_norm=bound,
        expected_batch_size=5,
    )  # fmt: skip
    before, other = weights(model), network()
    sums = [torch.zeros_like(w) for w in before]
    bounds = bound if isinstance(bound, list) else [bound / (2 if clipping == "per_layer" else 1)] * 4
    for row in range(8):
        other.zero_grad()
        backward(other, rows=slice(row, row + 1))
        grads = [p.grad for p in other.parameters()]
        norms = [g.norm() for g in grads]
        if clipping == "flat":
            norms = [torch.stack(norms).norm()] * 4
        for total, g, norm, c in zip(sums, grads, norms, bounds, strict=True):
            total += min(1.0, c / float(norm)) * g
    assert max(map(float, (s.norm() for s in sums))) > 0
    backward(model)
    optimizer.step()
    moved = [b - a for a, b in zip(weights(model), before, strict=True)]
    for a, total in zip(moved, sums, strict=True):
        torch.testing.assert_close(a, total / 5, rtol=1e-5, atol=1e-6)
    assert math.isclose(optimizer.sensitivity, math.hypot(*bounds) if clipping == "per_layer" else bound)


@pytest.mark.parametrize(
    "clipping, bound, sensitivity", [("flat", 2.0, 2.0), ("per_layer", [1.0, 2.0, 2.0, 4.0], 5.0)]
)
def test_noise_is_that_of_the_sensitivity(clipping, bound, sensitivity):
    """√(Σ C²) for clipping by layers: every layer, whatever its own bound, has the same noise."""
    model = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 200))
    before = weights(model)
    optimizer = DPOptimizer(
        fastreg.SGD(model.parameters(), lr=1.0), model=model, noise_multiplier=3.0, max_grad_norm=bound,
        clipping=clipping, expected_batch_size=10, noise_seed=1,
    )  # fmt: skip
    optimizer.step()
    for a, b in zip(weights(model), before, strict=True):
        error = 4 / math.sqrt(2 * a.numel())
        assert abs(float((a - b).std()) / (3.0 * sensitivity / 10) - 1) < error


@pytest.mark.parametrize("make", [fastreg.AdamW, torch.optim.AdamW])
def test_parts_of_a_batch_are_the_batch(make, close):
    """By backward passes, by accumulate(), and by signals to skip."""
    whole, optimizer = private(make=make, loss_reduction="sum")
    backward(whole, reduction="sum")
    optimizer.step()
    for how in ("backward", "accumulate", "signal"):
        model, optimizer = private(make=make, loss_reduction="sum")
        for rows in (slice(0, 3), slice(3, 6), slice(6, 8)):
            if how != "backward":
                optimizer.zero_grad()
            backward(model, reduction="sum", rows=rows)
            if rows.stop < 8 and how == "accumulate":
                optimizer.accumulate()
            if how == "signal":
                optimizer.signal_skip_step(rows.stop < 8)
                optimizer.step()
        if how != "signal":
            optimizer.step()
        close(weights(model), weights(whole))


@pytest.mark.parametrize("make", [fastreg.AdamW, torch.optim.AdamW])
def test_a_step_without_backward_pass(make):
    """An empty batch: noise for every parameter, accounted for like any other."""
    model, optimizer = private(make=make, accountant="rdp", sample_rate=0.1)
    before = weights(model)
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    assert optimizer.accountant.history == [(1.0, 0.1, 1)]


def test_an_unused_layer_is_noised():
    """Whether a layer is used may depend on the data."""
    model = network()
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    model, optimizer = private(model)
    before = model.spare.weight.detach().clone()
    backward(model)
    optimizer.step()
    assert (model.spare.weight != before).all()


def test_frozen_parameters_stay():
    model = network()
    model[0].requires_grad_(False)
    model, optimizer = private(model)
    before = weights(model)
    train(model, optimizer)
    assert [torch.equal(a, b) for a, b in zip(weights(model), before, strict=True)] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_samples_that_are_not_finite_count_for_nothing(bad, close):
    runs = [private(noise_multiplier=0.0, loss_reduction="sum") for _ in range(2)]
    backward(runs[0][0], reduction="sum", rows=slice(1, 8))
    x, y = batch()
    x[0, 3] = bad
    nn.functional.cross_entropy(runs[1][0](x), y, reduction="sum").backward()
    for _, optimizer in runs:
        optimizer.step()
    close(weights(runs[1][0]), weights(runs[0][0]))
    assert runs[1][1].bookkeeping.nonfinite_samples == 1


def test_neighbouring_batches_differ_by_no_more_than_the_bound():
    """With one sample more the sum moves by C at most, and the noise is the same."""
    found = []
    for samples in (7, 8):
        model, optimizer = private(make=fastreg.SGD, lr=1.0, loss_reduction="sum", max_grad_norm=0.25)
        before = weights(model)
        backward(model, reduction="sum", rows=slice(samples))
        optimizer.step()
        found.append(
            torch.cat([(a - b).flatten().double() for a, b in zip(weights(model), before, strict=True)])
        )
    moved = float((found[1] - found[0]).norm())
    assert 0.2 < moved < 0.25 * (1 + 1e-4)  # what rounding of the weights leaves


@pytest.mark.parametrize("make", [fastreg.AdamW, torch.optim.AdamW])
def test_gradients_are_gone_or_noised(make):
    model, optimizer = private(make=make)
    train(model, optimizer, 1)
    assert all(p.grad is None for p in model.parameters())
    backward(model)
    optimizer.step()
    assert all((p.grad is None) == (make is fastreg.AdamW) for p in model.parameters())


def test_materialized_gradients(close):
    """The same weights, and the gradient that they were made by."""
    expected = train(*private(make=fastreg.SGD, lr=1.0))
    model, optimizer = private(make=fastreg.SGD, lr=1.0, materialize_grad=True)
    close(train(model, optimizer), expected)
    before = weights(model)
    backward(model)
    optimizer.step()
    close(weights(model), [b - p.grad for b, p in zip(before, model.parameters(), strict=True)])
    backward(model)
    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.step()


@pytest.mark.parametrize("make", [fastreg.AdamW, torch.optim.AdamW])
def test_16_bit_weights(make):
    """Sums and noise are float32; torch's optimizers get what was rounded after the noise."""
    model, optimizer = private(network(torch.bfloat16), make=make)
    before = weights(model)
    for _ in range(2):
        x, y = batch(dtype=torch.bfloat16)
        nn.functional.cross_entropy(model(x).float(), y).backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        optimizer.step()
        assert make is fastreg.AdamW or all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
        optimizer.zero_grad()
    assert all(not torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


# What is inside


def test_clipping_and_noise_of_the_base_come_behind(close):
    """ClipNorm measures and clips the noised gradient: everything behind the noise is post-processing."""
    model, optimizer = private(make=fastreg.SGD, lr=1.0, materialize_grad=True)
    backward(model)
    optimizer.step()
    noised = [p.grad.clone() for p in model.parameters()]
    norm = torch.stack([g.norm() for g in noised]).norm()
    assert norm > 0.2
    for backend in ("reference", "triton"):
        clipped = lambda ps, lr: fastreg.SGD(ps, lr, regularizers=[fastreg.ClipNorm(0.1)])  # noqa: E731
        model, optimizer = private(make=clipped, lr=1.0)
        before = weights(model)
        backward(model)
        with fastreg.use_backend(backend):
            optimizer.step()
        assert math.isclose(optimizer.grad_norm, norm, rel_tol=1e-5)
        for a, b, g in zip(weights(model), before, noised, strict=True):
            torch.testing.assert_close(b - a, g * (0.1 / norm), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda ps, lr: fastreg.AdamW(ps, lr, regularizers=[fastreg.EMA(0.9), fastreg.GradientNoise(0.1)]),
        lambda ps, lr: fastreg.Lookahead(fastreg.AdamW(ps, lr), k=2),
        lambda ps, lr: fastreg.Lookahead(torch.optim.AdamW(ps, lr), k=2),
        lambda ps, lr: fastreg.SGD(ps, lr, momentum=0.9, regularizers=[fastreg.MSAM(0.1)]),
    ],
)
def test_bases_that_are_put_together(make):
    model, optimizer = private(make=make)
    before = weights(model)
    train(model, optimizer)
    assert all(not torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    if hasattr(optimizer, "averaged") and isinstance(optimizer.base_optimizer, fastreg.AdamW):
        with optimizer.averaged():
            assert not torch.equal(weights(model)[0], before[0])


def test_from_parameters():
    model = network()
    optimizer = DPOptimizer(model.parameters(), model=model, expected_batch_size=8, lr=0.1, weight_decay=0.5)
    assert type(optimizer.base_optimizer) is fastreg.AdamW and optimizer.defaults["weight_decay"] == 0.5
    optimizer.detach()
    optimizer = DPOptimizer(
        model.parameters(), model=model, expected_batch_size=8, optimizer=torch.optim.SGD, lr=0.1
    )
    assert type(optimizer.original_optimizer) is torch.optim.SGD
    with pytest.raises(TypeError, match="'lr' is for the optimizer"):
        DPOptimizer(torch.optim.SGD(network().parameters(), 0.1), expected_batch_size=8, lr=0.1)


def test_hooks_closures_and_schedulers():
    model, optimizer = private()
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure():
        optimizer.zero_grad()
        x, y = batch()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.step(closure) > 0
        scheduler.step()
    assert calls == [1] and optimizer.param_groups[0]["lr"] == 0.005


def test_detach_gives_both_back(close):
    model, optimizer = private(make=fastreg.SGD, lr=0.1)
    base = optimizer.detach()
    plain = network()
    other = torch.optim.SGD(plain.parameters(), lr=0.1)
    for net, opt in ((model, base), (plain, other)):
        backward(net)
        opt.step()
    close(weights(model), weights(plain))


# Accounting


def test_steps_are_accounted_for_exactly():
    """Noise that changes between steps, parts of batches and empty batches."""
    model, optimizer = private(accountant="rdp", sample_rate=0.1)
    train(model, optimizer, 2)
    optimizer.noise_multiplier = 2.0
    backward(model)
    optimizer.accumulate()
    optimizer.zero_grad()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.accountant.history == [(1.0, 0.1, 2), (2.0, 0.1, 2)]
    found = optimizer.epsilon(1e-5)
    assert found == optimizer.accountant.get_epsilon(1e-5) and "RDP" in found.source


def test_an_accountant_without_history():
    class Steps:
        taken = 0

        def step(self, **_):
            self.taken += 1

        def get_epsilon(self, delta):
            return float(self.taken)

    _, optimizer = private(accountant=Steps(), sample_rate=0.1)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.epsilon(1e-5) == 1.0


def test_a_step_is_accounted_for_before_it_is_taken(monkeypatch):
    model, optimizer = private(accountant="rdp", sample_rate=0.1)
    monkeypatch.setattr(fastreg.engine.launch, "run", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert optimizer.accountant.history == [(1.0, 0.1, 1)]


@pytest.mark.parametrize("name, value", [("noise_multiplier", 0.5), ("max_grad_norm", 2.0)])
def test_a_hook_may_not_change_what_it_accounts_for(name, value):
    model, optimizer = private()
    before = weights(model)
    optimizer.attach_step_hook(lambda o: setattr(o, name, value))
    backward(model)
    with pytest.raises(RuntimeError, match="between steps"):
        optimizer.step()
    assert all(map(torch.equal, weights(model), before))


# Checkpoints


def restored(state, **options):
    model, optimizer = private(**options)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # torch's share what they are given
    return model, optimizer


def saved(model, optimizer):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("make", [fastreg.AdamW, torch.optim.AdamW])
def test_resuming(make):
    """Weights, moments and history exactly; noise of its own, another at every time."""
    options = {"make": make, "accountant": "rdp", "sample_rate": 0.1, "noise_seed": None}
    model, optimizer = private(**options)
    train(model, optimizer)
    state = saved(model, optimizer)
    assert not any(
        str(optimizer._mechanism.noise.key) in str(group) for group in state["optimizer"]["param_groups"]
    )
    outcomes = []
    for _ in range(2):
        again, other = restored(state, **options)
        assert other.accountant.history == optimizer.accountant.history == [(1.0, 0.1, 3)]
        assert all(map(torch.equal, weights(again), weights(model)))
        for p, q in zip(again.parameters(), model.parameters(), strict=True):
            assert all(torch.equal(other.state[p][name], value) for name, value in optimizer.state[q].items())
        outcomes.append(train(again, other, 1)[0])
        assert other.accountant.history == [(1.0, 0.1, 4)]
    assert not torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], train(model, optimizer, 1)[0])


def test_loading_in_place_renews_the_key():
    """Going back in one process does not go back in the noise."""
    model, optimizer = private(noise_seed=None)
    state = saved(model, optimizer)
    outcomes = []
    for _ in range(2):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        outcomes.append(train(model, optimizer, 1)[0])
    assert not torch.equal(*outcomes)


@pytest.mark.parametrize("make", [fastreg.AdamW, torch.optim.AdamW])
def test_resuming_reproducibly(make):
    options = {"make": make, "noise_seed": None, "reproducible": True}
    model, optimizer = private(**options)
    train(model, optimizer)
    state = saved(model, optimizer)
    expected = train(model, optimizer)
    for _ in range(2):
        assert all(map(torch.equal, train(*restored(state, **options)), expected))
    again, other = restored(state, **{**options, "reproducible": False})
    assert not torch.equal(train(again, other)[0], expected[0])


def test_state_dicts_are_those_of_torch():
    model, optimizer = private()
    train(model, optimizer)
    assert "privacy" not in optimizer.state_dict()["param_groups"][0]
    plain = torch.optim.AdamW(model.parameters())
    plain.load_state_dict(optimizer.state_dict())
    other, fresh = private()
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh.state[other[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])


# Refusals


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
        ({"accountant": "gdp", "sample_rate": 0.1}, "too little"),
    ],
    ids=str,
)
def test_values_out_of_range(options, match):
    for model in (None, network()):
        optimizer = base() if model is None else torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=match):
            DPOptimizer(optimizer, **{"model": model, "expected_batch_size": 8, **options})


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


# Sampling


def test_poisson_sampling():
    """Each sample by itself: sizes are binomial, batches may be empty, and all samples come as often."""
    sampler = PoissonSampler(50, 0.1, steps=4000, generator=torch.Generator().manual_seed(0))
    batches = list(sampler)
    sizes = torch.tensor([len(b) for b in batches], dtype=torch.float64)
    assert len(batches) == len(sampler) == 4000 and (sizes == 0).any()
    assert abs(sizes.mean() - 5) < 4 * math.sqrt(4.5 / 4000) and abs(sizes.var() - 4.5) < 0.5
    counts = torch.bincount(torch.tensor([i for b in batches for i in b]), minlength=50)
    assert ((counts - 400).abs() < 5 * math.sqrt(360)).all()


@pytest.mark.parametrize(
    "wrong", [{"steps": 2.5}, {"steps": True}, {"steps": -1}, {"samples": 2.5}, {"samples": 0}]
)
def test_numbers_of_samples_and_steps_are_whole(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name} must be a whole number >= ., got {name}={value}"):
        PoissonSampler(**{"samples": 10, "sample_rate": 0.5, **wrong})


def test_what_is_drawn_is_secret_by_default():
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(list(PoissonSampler(100, 0.5, steps=1)))
    assert found[0] != found[1]


def test_poisson_loader():
    data = TensorDataset(*batch(20))
    loader = poisson_loader(data, 0.05, steps=60, generator=torch.Generator().manual_seed(0))
    batches = list(loader)
    assert len(batches) == len(loader) == 60 and any(b is None for b in batches)
    assert all(b is None or b[0].shape[1:] == (6,) for b in batches)
    assert len(poisson_loader(data, 0.05)) == 20
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match="sample_rate"):
            poisson_loader(data, wrong)


# Two processes: run as a program, this file is one of them.

WORLD, TIMEOUT = 2, 120
ROWS = [(6, 4), (5, 3), (1, 7), (13,), (37, 131)]


def noise_of(place):
    """A step of noise on tensors that `place` may shard."""
    params = [nn.Parameter(place(torch.zeros(shape))) for shape in ROWS]
    for p in params:
        p.grad_sample = None
    optimizer = DPOptimizer(fastreg.SGD(params, lr=1.0), loss_reduction="sum", noise_seed=3)
    for _ in range(2):
        optimizer.step()
    return [p.detach() for p in params]


def shared(rank, world):
    """A batch in parts, one for each process, with a key that they agree on."""
    model, optimizer = private(noise_seed=None, noise_multiplier=0.0)
    for _ in range(3):
        backward(model, rows=slice(rank, None, world))
        optimizer.step()
        optimizer.zero_grad()
    mean = weights(model)
    optimizer.noise_multiplier = 1.0
    if rank == 0:  # the other has an empty batch
        backward(model)
    optimizer.step()
    return {"mean": mean, "noised": weights(model), "key": optimizer._mechanism.noise.key}


def process(rank, folder):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    warnings.simplefilter("ignore")
    store = dist.FileStore(str(Path(folder) / "store"), WORLD)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=90)
    )
    mesh = init_device_mesh("cpu", (WORLD,))
    shards = noise_of(lambda t: distribute_tensor(t, mesh, [Shard(0)]))
    out = {"noise": [t.full_tensor() for t in shards], **shared(rank, WORLD)}
    torch.save(out, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONPATH": str(Path(fastreg.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE
        )
        for rank in range(WORLD)
    ]
    end = time.monotonic() + TIMEOUT
    errors = [p.communicate(timeout=max(1, end - time.monotonic()))[1] for p in running]
    for p, error in zip(running, errors, strict=True):
        assert p.returncode == 0, error.decode()
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_noise_of_shards_is_that_of_the_whole(processes):
    expected = noise_of(lambda t: t)
    for found in processes:
        assert all(map(torch.equal, found["noise"], expected))


def test_processes_share_a_batch(processes, close):
    """Sums over processes, one noise, and weights that stay the same everywhere."""
    model, optimizer = private(noise_multiplier=0.0)
    expected = []
    for _ in range(3):
        for part in (0, 1):
            backward(model, rows=slice(part, None, 2))
        optimizer.step()
        optimizer.zero_grad()
    expected = weights(model)
    first, second = processes
    assert first["key"] == second["key"]
    for found in processes:
        close(found["mean"], expected)
    assert all(map(torch.equal, first["noised"], second["noised"]))
    assert not torch.equal(first["noised"][0], first["mean"][0])


if __name__ == "__main__":
    try:
        process(int(sys.argv[1]), sys.argv[2])
    except BaseException:
        traceback.print_exc()
        os._exit(1)
