"""Times L1 and L2 penalties in the loss, forward and backward, against sums written in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fastreg

from . import shapes
from .steps import DTYPES, models, rounds
from .suite import OURS, Case, Check

BASELINE = "a sum of sums"


@dataclass
class Workload:
    """Weights, and the value of their penalty in float64."""

    parameters: list[Parameter]
    value: float


@dataclass(eq=False)  # hashed by identity
class PenaltyCase(Case):
    """Value and gradients of the penalty on the weights of a model."""

    kind: str
    model: str
    sizes: shapes.Sizes
    storage: str
    rounds: int
    suite: str = "penalty"
    baseline: str = BASELINE

    def __post_init__(self) -> None:
        self.name = f"{self.kind} penalty, forward and backward, {self.model}, {self.storage}"
        # Weights are read for the value and again for the gradients, which are written.
        self.bytes = 3 * sum(map(math.prod, self.sizes)) * DTYPES[self.storage].itemsize

    def setup(self, device: torch.device) -> Workload:
        generator = torch.Generator(device).manual_seed(0)
        drawn = [torch.randn(size, generator=generator, device=device) for size in self.sizes]
        parameters = [Parameter(each.to(DTYPES[self.storage])) for each in drawn]
        wide = (p.detach().double() for p in parameters)
        return Workload(
            parameters, math.fsum(float((w.abs() if self.kind == "L1" else w.square()).sum()) for w in wide)
        )

    def contenders(self) -> dict[str, Callable[[Workload], Any]]:
        """Returns fastreg's penalty, a loop that sums each weight, and torch's norm of many tensors."""
        contenders: dict[str, Callable[[Workload], Any]] = {
            OURS: lambda workload: _Run(
                workload, fastreg.l1_penalty if self.kind == "L1" else fastreg.l2_penalty
            ),
            BASELINE: lambda workload: _Run(workload, _absolute if self.kind == "L1" else _squares),
        }
        order = 1 if self.kind == "L1" else 2
        return contenders | {
            "torch._foreach_norm": lambda workload: _Run(
                workload,
                lambda parameters: torch.stack(torch._foreach_norm(parameters, order)).pow(order).sum(),
            )
        }

    def verify(self, name: str, workload: Workload, run: Any) -> list[Check]:
        """Compares value and gradients with those in float64.

        The bounds of other contenders are wider, since they sum in the dtype of the weights.
        """
        value, gradients = run()
        narrow = DTYPES[self.storage] != torch.float32
        off = 0.0
        for p, g in zip(workload.parameters, gradients, strict=True):
            exact = p.detach().double().sign() if self.kind == "L1" else 2 * p.detach().double()
            off = max(off, float((g.double() - exact).abs().max() / exact.abs().max()))
        ours = name == OURS
        return [
            Check("value", abs(float(value) / workload.value - 1), 1e-6 if ours else 2e-2),
            Check("gradients", off, 1e-6 if ours or not narrow else 2e-2),
        ]


class _Run:
    """A run that computes value and gradients of a penalty."""

    def __init__(self, workload: Workload, penalty: Callable[[list[Parameter]], Tensor]) -> None:
        self._parameters, self._penalty = workload.parameters, penalty

    def __call__(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        value = self._penalty(self._parameters)
        return value.detach(), torch.autograd.grad(value, self._parameters)


def _squares(parameters: list[Parameter]) -> Tensor:
    return torch.stack([p.pow(2).sum() for p in parameters]).sum()


def _absolute(parameters: list[Parameter]) -> Tensor:
    return torch.stack([p.abs().sum() for p in parameters]).sum()


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Returns cases over GPT-2, and over many small tensors."""
    over, turns = models(device, quick), rounds(device, quick)
    chosen = (("L2", "gpt2", "fp32"), ("L2", "gpt2", "bf16"), ("L2", "many", "fp32"), ("L1", "gpt2", "fp32"))
    return [PenaltyCase(kind, *over[model], storage, turns) for kind, model, storage in chosen]
