"""Times the optimizer's part of sharpness-aware minimization: both steps of SAM, on given gradients."""

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
    """A run of `first_step` and `second_step` of SAM or ASAM.

    Both use the same gradients, so the weights after both are those of the base optimizer.  The perturbed
    weights in between are verified separately.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.adaptive = "ASAM" in self.chain
        climb = chains.pass_at("ASAM climb" if self.adaptive else "SAM climb", self.storage)
        weight, gradient, *_ = (dtype.itemsize for dtype in climb.dtypes)
        self.bytes += self.elements * (climb.bytes + gradient + weight * self.adaptive)

    def _build(self, name: str, workload: Workload) -> peers.Step:
        # Each optimizer gets its own copies of the weights.  `PublishedSAM` gives weights new memory at each
        # step, so an optimizer that keeps addresses of the same weights would have to collect them again.
        params = [Parameter(weight.clone()) for weight in workload.start]
        for p, other in zip(params, workload.params, strict=True):
            p.grad = other.grad
        return replace(super()._build(name, replace(workload, params=params)), params=params)

    def verify(self, name: str, workload: Workload, run: Any) -> list[Check]:
        """Compares three runs with steps of the base optimizer, and the perturbation with ρT²g / ‖Tg‖.

        T is the identity for SAM and |w| for ASAM; the norm is in float64.
        """
        copy = replace(workload, params=run.params)
        checks = super().verify(name, copy, run)
        copy.reset()
        run.optimizer.first_step()
        off = difference([p.detach() for p in copy.params], self._perturbed(copy))
        run.optimizer.second_step()
        # Other contenders take the norm in float32.
        return [*checks, Check("perturbed weights", off, BOUNDS[self.storage] if name == OURS else LOOSE)]

    def _perturbed(self, workload: Workload) -> list[Tensor]:
        def scaled(weight: Tensor, gradient: Tensor) -> Tensor:
            return weight.abs() * gradient if self.adaptive else gradient

        pairs = list(zip(workload.start, workload.gradients, strict=True))
        size = peers.radius(workload.params) / whole_norm([scaled(*pair) for pair in pairs])
        return [w + size * (scaled(w.abs(), scaled(w, g))) for w, g in pairs]


@dataclass(eq=False)
class MsamCase(StepCase):
    """A step with momentum-SAM, compared with the same step without it."""

    def _judge(self, workload: Workload, judged: str) -> tuple[list[Tensor], list[Tensor]]:
        """Returns for MSAM the weights of torch's loop minus ρ · momentum / ‖momentum‖, and no averages."""
        if "MSAM" not in judged.split("+"):
            return super()._judge(workload, judged)
        params = [Parameter(weight.to(torch.float32, copy=True)) for weight in workload.start]
        optimizer = peers.torch_optimizer(judged, params, foreach=False)
        away = [torch.zeros_like(p) for p in params]
        # An L2 penalty is part of the loss, so its gradient is also taken at the perturbed weights.
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
    """Returns the cases over GPT-2: SAM, momentum-SAM, and ASAM unless quick."""
    over, turns = models(device, quick)["gpt2"], 5 if quick else 20 if device.type == "cuda" else 7
    chosen = [("SAM+AdamW", SamCase), ("MSAM+AdamW", MsamCase)]
    if not quick:
        chosen[1:1] = [("SAM+SGD-momentum", SamCase), ("ASAM+AdamW", SamCase)]
        chosen += [("MSAM+SGD-momentum", MsamCase)]
    return [
        make("sam", chain, *over, rounds=turns, part="MSAM" if make is MsamCase else "")
        for chain, make in chosen
    ]
