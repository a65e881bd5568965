"""Loss scaling: Trainer's of `fp16=True`, without a GPU: its scaler, and no autocast."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode

import fastreg
import fastreg.hf
from fastreg.hf import FastregTrainer
from fastreg.hf.optimizer import unwrap_optimizer


class Scaled(FastregTrainer):
    """As with fp16, but for the dtype."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        self.accelerator.unscale_gradients = self._unscale

    def _unscale(self) -> None:
        """As accelerate does, but for the dtype."""
        self.accelerator.scaler.unscale_(unwrap_optimizer(self.optimizer))


KINDS = {
    "adamw": lambda tools: tools.adamw(regularizers=[fastreg.EMA(0.8)]),
    "sam": lambda tools: tools.sam(rho=0.3),
    "sam around torch": lambda tools: tools.sam(torch.optim.AdamW, rho=0.3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_changes_nothing(runs, tools, kind) -> None:
    arguments = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    plain, scaled = (
        runs.train(cls, dropout=0.0, arguments=arguments, **KINDS[kind](tools))
        for cls in (FastregTrainer, Scaled)
    )
    assert tools.distance(tools.weights(scaled.model), tools.weights(plain.model)) < 1e-5
    assert tools.logged(scaled, "grad_norm") == pytest.approx(tools.logged(plain, "grad_norm"), rel=1e-5)
    assert tools.logged(scaled, "loss") == pytest.approx(tools.logged(plain, "loss"), rel=1e-5)


def overflowing(model: nn.Module, overflow: int, passes: int = 0) -> nn.Module:
    """The model, whose gradients overflow in one of its passes, of which so many have been made."""
    passed = itertools.count(passes)

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if next(passed) == overflow:
            output.loss = output.loss * torch.finfo(torch.float32).max

    model.register_forward_hook(hook)
    return model


@pytest.mark.parametrize(
    ("kind", "overflow"),
    [("adamw", 1), ("sam", 2), ("sam", 3), ("sam around torch", 2), ("sam around torch", 3)],
)
def test_a_step_that_overflows_is_left_out(runs, tools, kind, overflow) -> None:
    """Of the second step, with SAM in its first or second pass; no rate goes on without a step."""
    model = overflowing(tools.tiny(0.0), overflow)
    weights, rates = [], []

    class Seeing(fastreg.hf.ScheduleCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            weights.append(tools.weights(model))
            rates.append(kwargs["lr_scheduler"].get_last_lr()[0])

    options = dict(KINDS[kind](tools))
    trainer = runs.train(Scaled, model=model, callbacks=[Seeing()], arguments={"max_steps": 4}, **options)
    assert tools.distance(weights[1], weights[0]) == 0
    assert tools.distance(weights[2], weights[1]) > 1e-4
    assert all(bool(w.isfinite().all()) for w in weights[-1].values())
    assert trainer.accelerator.scaler.get_scale() == 2.0**9
    assert rates == pytest.approx([0.75e-2, 0.75e-2, 0.5e-2, 0.25e-2])


class Unscaling(TorchDispatchMode):
    """Counts how often all gradients are checked and divided by the scale, in a pass of its own."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += "_amp_foreach_non_finite_check_and_unscale_" in func.__name__
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("kind", "passes"), [("adamw", 0), ("sam", 0), ("sam around torch", 2)])
def test_gradients_are_unscaled_in_the_step(runs, tools, kind, passes) -> None:
    trainer = runs.trainer(Scaled, arguments={"max_steps": 2}, **KINDS[kind](tools))
    with Unscaling() as seen:
        trainer.train()
    assert seen.number == passes


def test_resumes_with_the_scale(runs, tools) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    model = overflowing(tools.tiny(0.0), 1)
    whole = runs.train(Scaled, model=model, arguments=arguments, **KINDS["adamw"](tools))
    folder = f"{whole.args.output_dir}/checkpoint-2"
    model = overflowing(tools.tiny(0.0), 1, passes=2)
    resumed = runs.train(Scaled, model=model, arguments=arguments, resume=folder, **KINDS["adamw"](tools))
    assert resumed.accelerator.scaler.get_scale() == 2.0**9
    assert tools.distance(tools.weights(resumed.model), tools.weights(whole.model)) == 0
    assert tools.logged(resumed, "learning_rate") == tools.logged(whole, "learning_rate")
