"""Times averages of weights: Lookahead, a moving average inside the step, and `AveragedModel` outside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import fastreg

from . import chains, shapes
from .steps import BOUNDS, StepCase, difference, models, rounds
from .suite import OURS, Case, Check


@dataclass(eq=False)  # hashed by identity
class LookaheadCase(StepCase):
    """A run of K steps with Lookahead, one of which synchronises."""

    steps: int = chains.K
    part: str = "Lookahead"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = f"{self.steps} steps of {self.name}"
        step = chains.at(chains.without(self.chain, self.part), self.storage)
        self.bytes += self.elements * (self.steps - 1) * step.bytes


@dataclass
class Workload:
    """A model, and two sets of weights for it."""

    model: nn.ParameterList
    weights: list[list[Tensor]]

    @torch.no_grad()
    def hold(self, turn: int) -> None:
        """Copies one set of weights into the model."""
        torch._foreach_copy_(list(self.model), self.weights[turn])


@dataclass(eq=False)
class AveragedModelCase(Case):
    """A call of `AveragedModel.update_parameters` that updates a moving average of all weights at once."""

    model: str
    sizes: shapes.Sizes
    rounds: int
    suite: str = "averages"
    baseline: str = "torch AveragedModel"

    def __post_init__(self) -> None:
        self.name = f"AveragedModel, {self.model}, fp32"
        self.bytes = sum(map(math.prod, self.sizes)) * chains.pass_at("AveragedModel", "fp32").bytes

    def setup(self, device: torch.device) -> Workload:
        generator = torch.Generator(device).manual_seed(0)
        weights = [
            [torch.randn(size, generator=generator, device=device) for size in self.sizes] for _ in range(2)
        ]
        return Workload(nn.ParameterList(nn.Parameter(weight.clone()) for weight in weights[0]), weights)

    def contenders(self) -> dict[str, Callable[[Workload], Any]]:
        """Returns the `AveragedModel` of fastreg and of torch, each with its own moving-average function."""
        return {
            OURS: lambda workload: _Update(workload.model, fastreg),
            self.baseline: lambda workload: _Update(workload.model, swa_utils),
        }

    def verify(self, name: str, workload: Workload, run: Any) -> list[Check]:
        """Compares averages after two updates: the first copies weights, the second moves by 1 - decay."""
        for turn in range(2):
            workload.hold(turn)
            run()
        pairs = zip(*workload.weights, strict=True)
        expected = [first + (1 - chains.DECAY) * (second - first) for first, second in pairs]
        averages = [p.detach() for p in run.averaged.module.parameters()]
        return [Check("averages", difference(averages, expected), BOUNDS["fp32"])]


class _Update:
    """A run that updates the `AveragedModel` of a Python module, fastreg or torch's `swa_utils`."""

    def __init__(self, model: nn.Module, module: Any) -> None:
        average = module.get_ema_multi_avg_fn(chains.DECAY)
        self.model, self.averaged = model, module.AveragedModel(model, multi_avg_fn=average)

    def __call__(self) -> None:
        self.averaged.update_parameters(self.model)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Returns the cases over GPT-2: Lookahead, a moving average in the step, and `AveragedModel`."""
    over, turns = models(device, quick)["gpt2"], rounds(device, quick)
    return [
        LookaheadCase(
            "averages", "AdamW+Lookahead", *over, rounds=min(turns, 20 if device.type == "cuda" else 7)
        ),
        StepCase("averages", "AdamW+EMA", *over, rounds=turns),
        AveragedModelCase(*over, turns),
    ]
