"""Settings, batches and models that loops refuse."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import fastreg
from fastreg.loops import (
    History,
    train_with_grad_clip_and_noise,
    train_with_weight_decay,
)

quiet = {"progress": False}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be"),
        ({"epochs": True}, ValueError, "epochs must be a whole number >= 1, got epochs=True"),
        ({"epochs": None}, ValueError, "epochs= or max_steps="),
        ({"max_steps": 0}, ValueError, "max_steps must be"),
        ({"accumulate": 0}, ValueError, "accumulate must be a whole number >= 1, got accumulate=0"),
        ({"accumulate": 2.5}, ValueError, "accumulate must be a whole number >= 1, got accumulate=2.5"),
        ({"accumulate": None}, ValueError, "accumulate must be"),
        ({"warmup": -1}, ValueError, "warmup must be a whole number >= 0"),
        ({"amp": "int8"}, ValueError, "amp must be"),
        ({"epoch": 3}, TypeError, "there is no setting 'epoch'; did you mean 'epochs'"),
        ({"clip": 3}, TypeError, "there is no setting 'clip'; there are epochs, max_steps"),
        ({"loss_fn": F.mse_loss, "compute_loss": F.mse_loss}, ValueError, "not both"),
        ({"optimizer": torch.optim.SGD, "regularizers": [fastreg.EMA(0.9)]}, TypeError, "no regularizers"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, TypeError, "must be a class"),
        ({"optimizer": lambda groups, lr: {}}, TypeError, "must make"),
        (
            {"optimizer": fastreg.SGD, "recipe": {"sam": 0.1}},
            ValueError,
            "sam or weight_decay.kind",
        ),
        ({"optimizer": fastreg.SGD, "recipe": {"optimizer": "lion"}}, ValueError, "leave one out"),
        ({"recipe": {"clp": 1}}, ValueError, "did you mean 'clip'"),
        ({"recipe": 0.5}, TypeError, "recipe must be"),
        ({"schedule": 0.5}, TypeError, "schedule must be a function"),
        ({"loss_fn": lambda out, y: out}, ValueError, "one number"),
        ({"validation": []}, ValueError, "validation has no batches"),
    ],
)
def test_wrong_arguments(options, error, message, loader, mlp):
    with pytest.raises(error, match=message):
        train_with_weight_decay(mlp(), loader(64, 64), lr=1e-2, **options, **quiet)


def test_an_optimizer_may_take_regularizers_in_its_options(loader, mlp):
    class Shorter(fastreg.SGD):
        def __init__(self, params, lr=0.1, **options):
            super().__init__(params, lr, **options)

    options = {"lr": 1e-2, "optimizer": Shorter, "regularizers": [fastreg.EMA(0.9)], "max_steps": 1, **quiet}
    history = train_with_weight_decay(mlp(), loader(64, 64), **options)
    assert any(isinstance(component, fastreg.EMA) for component in history.optimizer.components)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "it is empty"),
        ([{"x": torch.zeros(2)}], ValueError, "no 'labels'"),
        ([torch.zeros(2)], ValueError, "loss_fn"),
        ([(torch.zeros(2), torch.zeros(2), torch.zeros(2))], TypeError, "3 parts"),
        (["text"], TypeError, "str"),
        ([(torch.zeros(2, 1), torch.zeros(2, 1))], ValueError, "no classification"),
        ([(torch.zeros(2, 1), torch.zeros(2).long())], ValueError, "no classification"),
        ([(torch.zeros(2, 3), torch.zeros(2))], ValueError, "no classification"),
    ],
)
def test_wrong_batches(batches, error, message, Tiny):
    with pytest.raises(error, match=message):
        train_with_weight_decay(Tiny(), batches, lr=1e-2, **quiet)


def test_a_history_of_another_model(loader, mlp):
    history = train_with_weight_decay(mlp(), loader(), lr=1e-2, max_steps=1, **quiet)
    model = history.model
    with pytest.raises(ValueError, match="of another model"):
        train_with_weight_decay(mlp(), loader(), lr=1e-2, history=history, **quiet)
    assert history.model is model and history.steps == 1


def test_a_model_without_loss_and_an_iterator_that_is_used_up(loader, mlp, gpt2, language):
    class Plain(nn.Linear):
        def forward(self, x, labels):
            return super().forward(x)

    with pytest.raises(ValueError, match="Plain has no loss"):
        train_with_weight_decay(
            Plain(2, 2), [{"x": torch.zeros(1, 2), "labels": torch.zeros(1)}], lr=0.1, **quiet
        )
    with pytest.raises(ValueError, match="after 1 epochs"):
        train_with_weight_decay(mlp(), iter(loader()), lr=1e-2, epochs=2, **quiet)
    with pytest.raises(TypeError, match="torch.nn.Module"):
        train_with_weight_decay("gpt2", loader(), lr=1e-2, **quiet)
    with pytest.raises(ValueError, match="noise_factor"):
        train_with_grad_clip_and_noise(gpt2(), language(1), lr=1e-2, noise_factor=-1.0, **quiet)


def test_shares_of_a_run_of_unknown_length(mlp, loader):
    with pytest.raises(ValueError, match="of the run"):
        train_with_weight_decay(
            mlp(), (batch for batch in loader()), lr=0.1, recipe={"ema": {"start": 0.5}}, **quiet
        )


def test_an_empty_history():
    assert History().steps == 0 and math.isnan(History().samples_per_second)
