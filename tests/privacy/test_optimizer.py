"""Steps of DPOptimizer: clipping, noise, parts of batches, and the base optimizer inside."""

import math
import warnings

import pytest
import torch
from torch import nn

import fastreg
from fastreg.privacy import DPOptimizer

from .conftest import backward, batch, network, private, train, weights

pytestmark = pytest.mark.filterwarnings("ignore:noise_seed")

TORCH = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}


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
    updates = []
    for samples in (7, 8):
        model, optimizer = private(make=fastreg.SGD, lr=1.0, loss_reduction="sum", max_grad_norm=0.25)
        before = weights(model)
        backward(model, reduction="sum", rows=slice(samples))
        optimizer.step()
        updates.append(
            torch.cat([(a - b).flatten().double() for a, b in zip(weights(model), before, strict=True)])
        )
    moved = float((updates[1] - updates[0]).norm())
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
