"""Recipes in the ready-made loops, and wrapped models."""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import fastreg
from fastreg.loops import (
    fine_tune_with_adaptive_regularization,
    train_with_grad_clip_and_noise,
    train_with_weight_decay,
)

quiet = {"progress": False}
RECIPE = {
    "weight_decay": 0.1, "clip": 0.5, "ema": 0.9, "sam": 0.05, "r_drop": 1.0,
    "optimizer": {"name": "sgd", "momentum": 0.9},
}  # fmt: skip


def same_weights(a, b):
    return all(map(torch.equal, a.parameters(), b.parameters()))


def test_equals_a_loop_written_by_hand(mlp, loader):
    """All passes of a recipe, in every step."""
    net, twin = mlp(0.2), mlp(0.2)
    torch.manual_seed(1)
    history = train_with_weight_decay(net, loader(64, 192), lr=0.1, recipe=RECIPE, epochs=2, **quiet)
    torch.manual_seed(1)
    optimizer, callbacks = fastreg.Regularization.from_dict(RECIPE).apply(twin, 0.1, 6)
    twin.train()
    losses = []
    for _ in range(2):
        for x, y in loader(64, 192):
            losses.append(float(callbacks.training_step(lambda: F.cross_entropy(twin(x), y), optimizer)))  # noqa: B023
            callbacks.step()
    assert history.losses == losses
    assert isinstance(history.optimizer, fastreg.SAM) and len(history.grad_norm) == 6
    assert same_weights(net, twin)


def test_forms_of_a_recipe(mlp, loader, tmp_path):
    pytest.importorskip("yaml")
    fields = {"weight_decay": 0.1, "sam": 0.1}
    path = tmp_path / "recipe.yaml"
    recipe = fastreg.Regularization.from_dict(fields)
    recipe.to_yaml(path)
    networks = []
    for form in (fields, recipe, path, str(path)):
        networks.append(mlp())
        train_with_weight_decay(networks[-1], loader(64, 128), lr=0.01, recipe=form, **quiet)
    assert all(same_weights(networks[0], other) for other in networks[1:])


def test_fields_of_the_recipe_replace_those_of_the_loop(mlp, loader):
    options = {"lr": 0.1, "noise_factor": 0.0, "optimizer": fastreg.SGD, **quiet}
    by_name, by_recipe, both = mlp(), mlp(), mlp()
    train_with_grad_clip_and_noise(by_name, loader(64, 128), max_norm=0.01, **options)
    train_with_grad_clip_and_noise(by_recipe, loader(64, 128), recipe={"clip": 0.01}, **options)
    assert same_weights(by_name, by_recipe)
    history = train_with_grad_clip_and_noise(
        both, loader(64, 128), recipe={"ema": 0.9}, regularizers=[fastreg.L1(0.1)], max_norm=0.01, **options
    )
    names = [type(component).__name__ for component in history.optimizer._components]
    assert {"ClipNorm", "EMA", "L1"} <= set(names)


def test_regularizers_beside_a_recipe(mlp, loader):
    averages = [fastreg.EMA(0.9), fastreg.EMA(0.99, name="slow_ema")]
    history = train_with_weight_decay(
        mlp(), loader(64, 128), lr=0.1, recipe={"sam": 0.1}, regularizers=averages, **quiet
    )
    state = next(iter(history.optimizer.state.values()))
    assert {"ema", "slow_ema"} <= state.keys()


@pytest.mark.parametrize("amp", [None, "fp16"])
def test_sam_of_a_recipe_or_of_a_function(amp, mlp, loader):
    """Each batch of a step is perturbed by its own gradients."""
    options = {"lr": 0.1, "weight_decay": 0.0, "accumulate": 2, "amp": amp, **quiet}
    net, twin = mlp(), mlp()
    recipe = {"sam": 0.1, "optimizer": "sgd"}
    train_with_weight_decay(net, loader(32, 128), recipe=recipe, **options)
    make = functools.partial(fastreg.SAM, base_optimizer=fastreg.SGD, rho=0.1)
    train_with_weight_decay(twin, loader(32, 128), optimizer=make, **options)
    assert same_weights(net, twin)
    if amp is None:
        by_hand = mlp()
        for first in (0, 64):
            gradients = []
            weights = [p.detach().clone() for p in by_hand.parameters()]
            for x, y in list(loader(32, 128))[first // 32 :][:2]:
                grad = torch.autograd.grad(F.cross_entropy(by_hand(x), y), list(by_hand.parameters()))
                norm = torch.stack([g.norm() for g in grad]).norm()
                with torch.no_grad():
                    for p, g in zip(by_hand.parameters(), grad, strict=True):
                        p.add_(0.1 * 0.5 * g / (0.5 * norm))
                gradients.append(
                    torch.autograd.grad(F.cross_entropy(by_hand(x), y), list(by_hand.parameters()))
                )
                with torch.no_grad():
                    for p, w in zip(by_hand.parameters(), weights, strict=True):
                        p.copy_(w)
            with torch.no_grad():
                for p, a, b in zip(by_hand.parameters(), *gradients, strict=True):
                    p.sub_(0.1 * (a + b) / 2)
        for p, q in zip(net.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_interruption_between_the_passes_of_sam_leaves_no_trace(accumulate, mlp, loader):
    net, start, passes = mlp(), mlp(), []

    def compute_loss(model, batch):
        passes.append(same_weights(net, start))
        if len(passes) == 2 * accumulate:
            raise KeyboardInterrupt
        return F.cross_entropy(model(batch[0]), batch[1])

    options = {"lr": 0.1, "recipe": {"sam": 0.5}, "accumulate": accumulate, **quiet}
    history = train_with_weight_decay(net, loader(), compute_loss=compute_loss, **options)
    assert not passes[-1] and history.interrupted and history.steps == 0
    for p, q in zip(net.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    train_with_weight_decay(net, loader(), history=history, max_steps=1, **options)
    train_with_weight_decay(start, loader(), max_steps=1, **options)
    for p, q in zip(net.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_goes_on_with_the_passes_of_a_recipe(mlp, loader):
    data, recipe = list(loader(64, 256)), {"sam": 0.1, "ema": 0.9}
    full, parted = mlp(), mlp()
    train_with_weight_decay(full, data, lr=0.01, recipe=recipe, **quiet)
    history = train_with_weight_decay(parted, data[:2], lr=0.01, recipe=recipe, **quiet)
    train_with_weight_decay(parted, data[2:], lr=0.01, recipe=recipe, history=history, **quiet)
    assert history.steps == 4 and same_weights(full, parted)


def test_shares_of_the_run(gpt2, language):
    """Of all steps, those before included."""
    net, rates = gpt2(), []
    options = {"lr": 1e-3, "recipe": {"dropout": {"rate": 0.4, "annealing": True}}, **quiet}
    options["callback"] = lambda history: rates.append(net.transformer.h[0].mlp.dropout.p)
    history = train_with_weight_decay(net, language(2), **options)
    assert rates == pytest.approx([0.2, 0.0])
    train_with_weight_decay(net, language(2), history=history, **options)
    assert rates[2:] == pytest.approx([0.1, 0.0])
    assert net.transformer.h[0].mlp.dropout.p == 0.1, "as before"


def test_dropout_of_a_recipe_replaces_that_of_fine_tuning(gpt2, language):
    net, rates = gpt2(), []
    fine_tune_with_adaptive_regularization(
        net, language(2), lr=1e-3, recipe={"dropout": 0.5}, **quiet,
        callback=lambda history: rates.append([block.mlp.dropout.p for block in net.transformer.h]),
    )  # fmt: skip
    assert rates == [[0.5] * 3] * 6


def test_a_recipe_turns_off_what_a_loop_does(gpt2, language):
    net, rates = gpt2(), []
    history = fine_tune_with_adaptive_regularization(
        net, language(2), lr=1e-3, recipe={"dropout": False, "clip": False}, epochs=1, **quiet,
        callback=lambda history: rates.append(net.transformer.h[0].mlp.dropout.p),
    )  # fmt: skip
    assert rates == [0.1] * 2 and history.grad_norm == []


@pytest.fixture
def distributed(tmp_path):
    """A group of one process."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "ddp": nn.parallel.DistributedDataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "both": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize(
    "loop",
    [
        train_with_weight_decay,
        functools.partial(train_with_weight_decay, recipe={"sam": 0.1}, accumulate=2),
        train_with_grad_clip_and_noise,
        functools.partial(fine_tune_with_adaptive_regularization, epochs=1),
    ],
    ids=["decay", "sam", "noise", "fine-tuning"],
)
def test_wrapped_models(loop, wrap, gpt2, language, distributed):
    """The same losses, gradients and weights as without the wrapper."""
    with contextlib.nullcontext() if wrap is WRAPPERS["ddp"] else torch.compiler.set_stance("force_eager"):
        net, plain = gpt2(), gpt2()
        wrapped, histories = wrap(net), []
        for model in (wrapped, plain):
            torch.manual_seed(3)
            histories.append(loop(model, language(4), lr=1e-2, **quiet))
        ids = language(1)[0]["input_ids"]
        train_with_weight_decay(wrapped, [ids], lr=0.0, **quiet)  # tokens are their own labels
    assert histories[0].losses == pytest.approx(histories[1].losses, rel=1e-5)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)
