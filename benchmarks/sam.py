"""The optimizer's share of sharpness-aware minimization: both steps of SAM, on given gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import chains, peers
from .steps import BOUNDS, LOOSE, SCALES, StepCase, Workload, difference, models, whole_norm
from .suite import OURS, Case, Check


@dataclass(eq=False)  # hashed by identity
class SamCase(StepCase):
    """`first_step` and `second_step` of SAM or ASAM.

    Both get the same gradients, so that the base optimizer alone determines the weights after both; the
    perturbed weights in between are verified on their own.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.adaptive = "ASAM" in self.chain
        climb = chains.pass_at("ASAM climb" if self.adaptive else "SAM climb", self.storage)
        weight, gradient, *_ = (dtype.itemsize for dtype in climb.dtypes)
        self.bytes += self.elements * (climb.bytes + gradient + weight * self.adaptive)

    def _build(self, name: str, workload: Workload) -> peers.Step:
        # Every optimizer gets copies of the weights: published ones move them in memory at every step, which
        # would make others that keep addresses look for them again.
        params = [Parameter(weight.clone()) for weight in workload.start]
        for p, other in zip(params, workload.params, strict=True):
            p.grad = other.grad
        return replace(super()._build(name, replace(workload, params=params)), params=params)

    def verify(self, name: str, workload: Workload, run: Any) -> list[Check]:
        """Three steps against the base optimizer's; the perturbed weights against ρT²g/‖Tg‖ in float64."""
        copy = replace(workload, params=run.params)
        checks = super().verify(name, copy, run)
        copy.reset()
        run.optimizer.first_step()
        off = difference([p.detach() for p in copy.params], self._perturbed(copy))
        run.optimizer.second_step()
        # Others take the norm in float32.
        return [*checks, Check("perturbed weights", off, BOUNDS[self.storage] if name == OURS else LOOSE)]

    def _perturbed(self, workload: Workload) -> list[Tensor]:
        def scaled(weight: Tensor, gradient: Tensor) -> Tensor:
            return weight.abs() * gradient if self.adaptive else gradient

        pairs = list(zip(workload.start, workload.gradients, strict=True))
        size = peers.radius(workload.params) / whole_norm([scaled(*pair) for pair in pairs])
        return [w + size * (scaled(w.abs(), scaled(w, g))) for w, g in pairs]


@dataclass(eq=False)
class MsamCase(StepCase):
    """A step with momentum-SAM, against the same step without."""

    def _judge(self, workload: Workload, judged: str) -> tuple[list[Tensor], list[Tensor]]:
        """The weights after torch's loop, and away from them by ρ along its momentum."""
        if "MSAM" not in judged.split("+"):
            return super()._judge(workload, judged)
        params = [Parameter(weight.to(torch.float32, copy=True)) for weight in workload.start]
        optimizer = peers.torch_optimizer(judged, params, foreach=False)
        away = [torch.zeros_like(p) for p in params]
        # A penalty belongs to the loss: its gradient, too, is that at the perturbed weights.
        penalty = 0.0 if "AdamW" in judged else peers.WEIGHT_DECAY
        for scale in SCALES:
            for p, gradient, e in zip(params, workload.gradients, away, strict=True):
                p.grad = gradient.float() * scale + penalty * e
            optimizer.step()
            states = (optimizer.state[p] for p in params)
            momenta = [state["exp_avg" if "exp_avg" in state else "momentum_buffer"] for state in states]
            size = peers.radius(params) / whole_norm(momenta)
            away = [-size * momentum for momentum in momenta]
        return [p.detach() + e for p, e in zip(params, away, strict=True)], []


def cases(device: torch.device, quick: bool) -> list[Case]:
    """SAM, ASAM and momentum-SAM over GPT-2."""
    over, turns = models(device, quick)["gpt2"], 5 if quick else 20 if device.type == "cuda" else 7
    chosen = [("SAM+AdamW", SamCase), ("MSAM+AdamW", MsamCase)]
    if not quick:
        chosen[1:1] = [("SAM+SGD-momentum", SamCase), ("ASAM+AdamW", SamCase)]
        chosen += [("MSAM+SGD-momentum", MsamCase)]
    return [
        make("sam", chain, *over, rounds=turns, part="MSAM" if make is MsamCase else "")
        for chain, make in chosen
    ]
