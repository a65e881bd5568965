"""Times the norm of the gradients, which clipping needs, without scaling the gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastreg.engine import launch
from fastreg.engine.batch import Batch
from fastreg.engine.stage import Chain
from fastreg.engine.table import Table
from fastreg.reference.norm import Measured

from . import shapes
from .steps import DTYPES, models, rounds
from .suite import OURS, Case, Check

BASELINE = "get_total_norm"


@dataclass
class Workload:
    """Gradients and their norm in float64."""

    gradients: list[Tensor]
    norm: float


@dataclass(eq=False)  # hashed by identity
class NormCase(Case):
    """The norm of all gradients of a model together."""

    model: str
    sizes: shapes.Sizes
    storage: str
    rounds: int
    suite: str = "norm"
    baseline: str = BASELINE

    def __post_init__(self) -> None:
        self.name = f"gradient norm, {self.model}, {self.storage}"
        self.bytes = sum(map(math.prod, self.sizes)) * DTYPES[self.storage].itemsize

    def setup(self, device: torch.device) -> Workload:
        generator = torch.Generator(device).manual_seed(0)
        gradients = [
            torch.randn(size, generator=generator, device=device).to(DTYPES[self.storage])
            for size in self.sizes
        ]
        return Workload(gradients, math.sqrt(sum(float(g.double().square().sum()) for g in gradients)))

    def contenders(self) -> dict[str, Callable[[Workload], Any]]:
        """Returns the norm as `ClipNorm` computes it, and torch's, with foreach functions and with a loop."""
        return {
            OURS: lambda workload: _Ours(workload.gradients),
            BASELINE: lambda workload: lambda: torch.nn.utils.get_total_norm(workload.gradients),
            "get_total_norm, loop": lambda workload: (
                lambda: torch.nn.utils.get_total_norm(workload.gradients, foreach=False)
            ),
        }

    def verify(self, name: str, workload: Workload, run: Any) -> list[Check]:
        # torch sums in float32 and rounds to the gradients' dtype: on a CPU, 38 M elements are off by 0.3 %.
        return [Check("norm", abs(float(run()) / workload.norm - 1), 1e-6 if name == OURS else 1e-2)]


class _Ours:
    """A run that computes the norm as a step does, with the table of kernel arguments that a step keeps."""

    def __init__(self, gradients: list[Tensor]) -> None:
        self._gradients, self._table = gradients, Table()
        self._limits = torch.ones(2, dtype=torch.float64, device=gradients[0].device)

    def __call__(self) -> Tensor:
        count = len(self._gradients)
        batch = Batch(
            Chain(()), self._gradients, self._gradients, [], [], [], [0] * count, [0] * count, [0] * count,
            [1], [[]], table=self._table,
        )  # fmt: skip
        return Measured(*launch.measure([batch], self._limits)).norm


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Returns the cases over GPT-2, and over many small tensors."""
    over, turns = models(device, quick), rounds(device, quick)
    return [
        NormCase(*over[model], storage, turns)
        for model, storage in (("gpt2", "fp32"), ("gpt2", "bf16"), ("many", "fp32"))
    ]
