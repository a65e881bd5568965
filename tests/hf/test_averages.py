"""Evaluations, checkpoints and the model that training leaves hold averages."""

from typing import Any

import pytest
import torch
import transformers as hf

import fastreg
from fastreg.hf.optimizer import unwrap_optimizer

AVERAGES = {
    "ema": lambda tools: tools.adamw(regularizers=[fastreg.EMA(0.8)]),
    "swa": lambda tools: tools.adamw(regularizers=[fastreg.SWA(start=1)]),
    "slow weights": lambda tools: tools.adamw(regularizers=[fastreg.SlowWeights(k=3)]),
    "sam": lambda tools: tools.sam(rho=0.3, regularizers=[fastreg.EMA(0.8)]),
    "msam": lambda tools: tools.adamw(regularizers=[fastreg.MSAM(1.0)]),
    "lookahead": lambda tools: {
        "model": (model := tools.tiny()),
        "optimizers": (fastreg.Lookahead(torch.optim.AdamW(model.parameters(), lr=1e-2), k=4), None),
    },
}  # fmt: skip


def averaged(optimizer: Any) -> bool:
    """Whether parameters hold averages now."""
    return any("averaged" in group for group in optimizer.param_groups)


class Watching(hf.TrainerCallback):
    """Weights and averages after each step, and the loss on the evaluation data with both."""

    def __init__(self, tools: Any, batch: Any) -> None:
        self.tools, self.batch = tools, batch
        self.raw: dict[int, Any] = {}
        self.averaged: dict[int, Any] = {}
        self.losses: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model=None, optimizer=None, **kwargs: Any):
        assert not averaged(optimizer)
        step = state.global_step
        self.raw[step] = self.tools.weights(model)
        with unwrap_optimizer(optimizer).averaged():
            self.averaged[step] = self.tools.weights(model)
            model.eval()
            with torch.no_grad():
                self.losses[step] = float(model(**self.batch).loss)
            model.train()


def watched(runs: Any, tools: Any, options: dict[str, Any], **arguments: Any) -> tuple[Any, Watching]:
    seen = Watching(tools, hf.default_data_collator(runs.data[:8]))
    return runs.train(arguments=arguments, callbacks=[seen], **options), seen


@pytest.mark.parametrize("kind", AVERAGES)
def test_checkpoints_evaluations_and_the_model_at_the_end_hold_averages(runs, tools, kind) -> None:
    trainer, seen = watched(
        runs, tools, AVERAGES[kind](tools), max_steps=7, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=3, save_total_limit=None,
    )  # fmt: skip
    for step in range(1, 8):
        assert tools.distance(tools.saved(trainer, step), seen.averaged[step]) == 0
    assert tools.distance(tools.weights(trainer.model), seen.averaged[7]) == 0
    assert tools.distance(seen.raw[5], seen.averaged[5]) > 1e-4
    assert tools.logged(trainer, "eval_loss") == pytest.approx(
        [seen.losses[step] for step in (3, 6, 7)], rel=1e-6
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(seen.losses[7], rel=1e-6)


def test_callbacks_find_the_averages_at_the_end_of_training(runs, tools) -> None:
    active: list[bool] = []

    class Storing(hf.TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            active.append(averaged(kwargs["optimizer"]))

    runs.train(callbacks=[Storing()], arguments={"max_steps": 2}, **AVERAGES["ema"](tools))
    assert active == [True]


def test_more_training_goes_on_from_the_trained_weights(runs, tools) -> None:
    trainer, seen = watched(runs, tools, AVERAGES["ema"](tools), max_steps=3, lr_scheduler_type="constant")
    first = dict(seen.raw)

    class Beginning(hf.TrainerCallback):
        def on_substep_end(self, *args: Any, model=None, **kwargs: Any) -> None:
            seen.raw.setdefault(0, tools.weights(model))

    trainer.add_callback(Beginning())
    trainer.args.gradient_accumulation_steps = 2
    trainer.train()
    assert tools.distance(seen.raw[0], first[3]) == 0


def test_the_best_model_is_loaded_and_trained_on(runs, tools) -> None:
    """The best is said to be the worst here, which is the first."""
    trainer, seen = watched(
        runs, tools, AVERAGES["ema"](tools), save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    best = trainer.state.best_global_step
    assert best == 2
    assert tools.distance(tools.weights(trainer.model), seen.averaged[best]) == 0
    assert trainer.evaluate()["eval_loss"] == pytest.approx(seen.losses[best], rel=1e-6)
    trainer.optimizer.train()
    assert tools.distance(tools.weights(trainer.model), seen.averaged[best]) == 0


@pytest.mark.parametrize("other", [{}, {"weight_noise": 0.01}, {"sam": 0.3}, {"adversarial": True}], ids=str)
def test_evaluations_change_nothing(runs, tools, other) -> None:
    """But the random numbers of dropout, on a CPU."""
    recipe = {"ema": 0.5, **other}
    never, always = (
        tools.weights(runs.train(dropout=0.0, recipe=recipe, arguments=arguments).model)
        for arguments in ({}, {"eval_strategy": "steps", "eval_steps": 1})
    )
    assert tools.distance(always, never) == 0


def test_an_optimizer_without_averages_is_saved_as_it_is(runs, tools) -> None:
    trainer = runs.train(arguments={"save_strategy": "steps", "save_steps": 6}, **tools.adamw())
    assert tools.distance(tools.saved(trainer, 6), tools.weights(trainer.model)) == 0
