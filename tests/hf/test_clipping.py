"""Clipping inside the step: once, as Trainer does it, and without a pass of Trainer's own."""

import logging
import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastreg
from fastreg.common.unwrap import find_optimizer
from fastreg.hf import FastregTrainer
from fastreg.optim.fused_optimizer import FusedOptimizer


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.1, 0])
def test_stock_trainer_with_torch_adamw_is_met(runs, tools, max_grad_norm, accumulated) -> None:
    arguments = {
        "max_grad_norm": max_grad_norm, "gradient_accumulation_steps": accumulated, "weight_decay": 0.1,
    }  # fmt: skip
    theirs = runs.train(hf.Trainer, arguments=arguments, **tools.torch_adamw())
    ours = runs.train(arguments=arguments, **tools.adamw())
    assert tools.distance(tools.weights(ours.model), tools.weights(theirs.model)) < 1e-5
    assert tools.logged(ours, "loss") == pytest.approx(tools.logged(theirs, "loss"), rel=1e-5)
    assert tools.logged(ours, "grad_norm") == pytest.approx(tools.logged(theirs, "grad_norm"), rel=1e-5)
    assert len(tools.logged(ours, "grad_norm")) == 6


def test_clipping_makes_a_difference_to_the_runs_above(runs, tools) -> None:
    clipped, not_clipped = (
        runs.train(arguments={"max_grad_norm": norm}, **tools.adamw(eps=1e-2)) for norm in (0.1, 0)
    )
    assert tools.distance(tools.weights(clipped.model), tools.weights(not_clipped.model)) > 1e-2


def test_any_other_optimizer_is_left_to_trainer(runs, tools) -> None:
    theirs, ours = (runs.train(cls, **tools.torch_adamw()) for cls in (hf.Trainer, FastregTrainer))
    assert tools.distance(tools.weights(ours.model), tools.weights(theirs.model)) == 0
    assert tools.logged(ours, "grad_norm") == tools.logged(theirs, "grad_norm")


def clip_of(trainer: Any) -> fastreg.ClipNorm:
    components = find_optimizer(trainer.optimizer, FusedOptimizer).components
    (clip,) = [component for component in components if isinstance(component, fastreg.ClipNorm)]
    return clip


@pytest.mark.parametrize("max_grad_norm", [0, 0.5])
def test_the_optimizers_own_clipping_may_be_repeated_or_left_out(runs, tools, max_grad_norm) -> None:
    trainer = runs.trainer(
        arguments={"max_grad_norm": max_grad_norm}, **tools.adamw(regularizers=[fastreg.ClipNorm(0.5)])
    )
    trainer.create_optimizer()
    assert clip_of(trainer).max_norm == 0.5


def test_the_optimizers_own_clipping_wins_against_the_default_which_is_told(runs, tools, caplog) -> None:
    hf.utils.logging.enable_propagation()
    try:
        trainer = runs.trainer(
            arguments={"log_level": "warning"}, **tools.adamw(regularizers=[fastreg.ClipNorm(0.5)])
        )
        with caplog.at_level(logging.WARNING):
            trainer.create_optimizer()
    finally:
        hf.utils.logging.disable_propagation()
    assert clip_of(trainer).max_norm == 0.5
    assert "ClipNorm(max_norm=0.5" in caplog.text and "max_grad_norm=1.0" in caplog.text


def test_clipping_twice_is_refused(runs, tools) -> None:
    trainer = runs.trainer(
        arguments={"max_grad_norm": 0.7}, **tools.adamw(regularizers=[fastreg.ClipNorm(0.5)])
    )
    with pytest.raises(ValueError, match=r"max_grad_norm=0.7 .* ClipNorm\(max_norm=0.5.* contradict"):
        trainer.train()


def test_max_grad_norm_may_change_between_runs(runs, tools) -> None:
    trainer = runs.train(arguments={"max_steps": 1}, **tools.adamw())
    trainer.args.max_grad_norm = 0.25
    trainer.train()
    assert clip_of(trainer).max_norm == 0.25
    trainer.args.max_grad_norm = 0
    trainer.train()
    assert clip_of(trainer).max_norm == math.inf


class Seen(TorchDispatchMode):
    """Operations on tensors as large as the smallest gradient, while it looks."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()
        self.looking = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        if self.looking and any(t.numel() >= 16 for t in tensors):
            self.operations.add(func.__name__)
        return func(*args, **kwargs or {})


def operations_outside(runs: Any, cls: type, **options: Any) -> set[str]:
    """Between backward and the next forward pass, without those of the step itself."""
    seen = Seen()

    class Watched(cls):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            seen.looking = False
            loss = super().training_step(*args, **kwargs)
            seen.looking = True
            return loss

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            optimizer = super().create_optimizer(*args, **kwargs)
            optimizer.register_step_pre_hook(lambda *_: setattr(seen, "looking", False))
            optimizer.register_step_post_hook(lambda *_: setattr(seen, "looking", True))
            return optimizer

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            seen.looking = False
            return super().get_batch_samples(*args, **kwargs)

    trainer = runs.trainer(Watched, arguments={"max_steps": 2}, **options)
    with seen:
        trainer.train()
        seen.looking = False
    return seen.operations


@pytest.mark.parametrize("kind", ["adamw", "sam"])
def test_gradients_are_touched_by_the_step_alone(runs, tools, kind) -> None:
    options = tools.adamw() if kind == "adamw" else tools.sam()
    assert operations_outside(runs, FastregTrainer, **options) == set()
    stock = operations_outside(runs, hf.Trainer, **tools.torch_adamw())
    assert {name.partition(".")[0] for name in stock} >= {"_foreach_norm", "_foreach_mul_"}
