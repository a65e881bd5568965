"""Interrupted at any step and resumed, a run is what it had been: bit for bit."""

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch.utils._pytree import tree_flatten

import fastreg
from fastreg.hf import ScheduleCallback
from fastreg.layerwise import DropoutScheduler
from fastreg.schedules import Linear

STEPS = 6
ADAMW = {
    "plain": [],
    "ema": [fastreg.EMA(0.8), fastreg.EMA(0.5, "fast", start=2, every=2)],
    "swa": [fastreg.SWA(start=2)],
    "slow weights": [fastreg.SlowWeights(k=2, pullback_momentum="pullback")],
    "noise": [fastreg.GradientNoise(0.1, gamma=0.55, relative=True)],
    "l2-sp": [fastreg.L2SP(0.1), fastreg.L1(1e-3)],
    "msam": [fastreg.MSAM(1.0), fastreg.EMA(0.8)],
}


def components(kind: str) -> list[Any]:
    """New ones for each run."""
    return copy.deepcopy(ADAMW[kind])


def options_of(kind: str, tools: Any) -> dict[str, Any]:
    if kind in ADAMW:
        return tools.adamw(regularizers=components(kind))
    if kind == "lookahead around torch":
        model = tools.tiny()
        optimizer = fastreg.Lookahead(torch.optim.AdamW(model.parameters(), lr=1e-2), k=2)
        return {"model": model, "optimizers": (optimizer, None)}
    if kind == "sam around torch":
        return tools.sam(torch.optim.AdamW, rho=0.3)
    if kind == "sam":
        return tools.sam(rho=0.3, interval=2, adaptive=True, regularizers=components("ema"))
    if kind == "sam, other masks":
        return {"same_masks": False, **tools.sam(rho=0.3)}
    assert kind == "annealed dropout"
    model = tools.tiny(0.3)
    annealed = DropoutScheduler(model, Linear(0.4, steps=STEPS))
    return {"model": model, "callbacks": [ScheduleCallback(annealed)], **tools.adamw()}


KINDS = [
    *ADAMW, "lookahead around torch", "sam around torch", "sam", "sam, other masks", "annealed dropout"
]  # fmt: skip


def state(trainer: Any) -> tuple[list[Any], Any]:
    """All of the optimizer's, as numbers and tensors, and how they hang together."""
    return tree_flatten([trainer.optimizer.state_dict(), trainer.lr_scheduler.state_dict()])


class Counting(hf.TrainerCallback):
    steps = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1


def check_resumption(runs: Any, tools: Any, steps: tuple[int, ...], make: Any) -> None:
    """Interrupt a run after each of the steps, and compare it with one that was not."""
    arguments = {
        "max_steps": STEPS, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
        "save_strategy": "steps", "save_steps": 1, "save_total_limit": None,
    }  # fmt: skip
    whole = runs.train(arguments=arguments, **make())
    for step in steps:
        folder = f"{whole.args.output_dir}/checkpoint-{step}"
        options, counting = make(), Counting()
        options["callbacks"] = [*options.get("callbacks", ()), counting]
        resumed = runs.train(arguments=arguments, resume=folder, **options)
        assert counting.steps == STEPS - step
        assert tools.logged(resumed, "loss") == tools.logged(whole, "loss")
        assert tools.logged(resumed, "grad_norm") == tools.logged(whole, "grad_norm")
        assert tools.logged(resumed, "eval_loss") == tools.logged(whole, "eval_loss")
        assert tools.distance(tools.weights(resumed.model), tools.weights(whole.model)) == 0
        (ours, form), (theirs, expected) = state(resumed), state(whole)
        assert form == expected
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


RECIPES: dict[str, dict[str, Any]] = {
    "weight noise": {"weight_noise": {"std": 0.01, "annealing": "linear"}},
    "noise on inputs": {"embedding_noise": {"alpha": 3.0, "annealing": "cosine"}, "token_noise": 0.1},
    "other passes": {"adversarial": {"epsilon": 0.1}, "r_drop": 1.0},
    "everything": {
        "weight_decay": 0.1, "lr_decay": 0.9, "dropout": {"rate": 0.2, "annealing": "linear"}, "clip": 1.0,
        "gradient_noise": 0.01, "embedding_noise": 1.0, "token_noise": 0.05, "weight_noise": 0.001,
        "activation_noise": {"std": 0.01, "annealing": "linear"}, "adversarial": {"epsilon": 0.01},
        "r_drop": 0.5, "sam": {"rho": 0.02, "start_step": 1}, "lookahead": 2, "ema": 0.8, "swa": 0.5,
        "l1": 1e-5, "l2sp": 1e-3,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow) if kind == "everything" else kind for kind in RECIPES],
)
def test_recipes_resume_bit_for_bit(runs, tools, kind) -> None:
    check_resumption(runs, tools, (1, 4) if kind == "everything" else (3,), lambda: {"recipe": RECIPES[kind]})


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_bit_for_bit(runs, tools, kind) -> None:
    steps = (1, 2, 4) if kind == "ema" else (1, 4) if kind == "sam" else (3,)
    check_resumption(runs, tools, steps, lambda: options_of(kind, tools))
