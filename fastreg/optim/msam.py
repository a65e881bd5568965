"""Momentum-SAM: sharpness-aware minimization with one backward pass, inside the step.

The weight in memory is w - c v, with the momentum v and c = ρ/‖v‖.  A step measures the momentum that it
will make (one read of momentum and gradient); then, in one pass, it takes c v out, updates w and puts the new
c v in.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..engine import layout
from ..engine.batch import NormSpec
from ..engine.component import Component, Phase, Work
from ..engine.grad_norm import measured
from ..engine.stage import Stage
from ..reference import ascent, rules
from ..reference.norm import Measured
from ..reference.step import scalar_dtype
from . import weight_averages
from .weight_averages import Average

TINY = 1e-12
"""Added to norms that are divided by, as in the published implementations."""

_RULES = (rules.sgd_momentum, rules.sgd_nesterov, rules.adam, rules.adam_amsgrad)
"""References of the rules whose first buffer is the momentum that they step along."""


class MSAM(Average):
    """Momentum-SAM: gradients are taken at w - ρ v/‖v‖ with the momentum v; one backward pass a step.

    For `SGD` with momentum, `Adam` and `AdamW` (v is `exp_avg`); works with accumulation, loss scaling and
    training loops that know nothing of it.  While training, parameters hold the perturbed weights, which is
    also what a model saved then holds; `optimizer.eval()`, or `with optimizer.averaged("msam"):`, shows the
    weights themselves.  Averages and Lookahead work on the weights themselves.  A parameter that has no
    gradient at a step keeps its perturbation.

    Args:
        rho: Radius ρ of the perturbation over all parameters; ≥ 0, may be changed between steps.  Larger than
            SAM's, 3 in the paper's experiments, since momentum is rarely aligned with the gradient.

    Raises:
        ValueError: If rho is negative or not finite.

    Reference:
        Becker, Altrock, Risse 2024, "Momentum-SAM: sharpness aware minimization without computational
        overhead".
    """

    phase = Phase.PERTURB
    name = "msam"
    computed = True
    _stage = Stage("ascent.perturb_momentum", ascent.perturb_momentum, device_scalars=("size",))

    def __init__(self, rho: float = 0.3) -> None:
        self.rho = weight_averages.check_range("rho", rho, 0)
        self._sizes: dict[torch.device, Tensor] = {}  # [2]: in the weight, and after this step
        self._limits: dict[torch.device, Tensor] = {}
        self._loaded = 0.0

    def around(self, rule: Component, decay_kind: str | None) -> tuple[Component, Component]:
        """The rule that takes the former perturbation out and hands on its momentum, and what descends."""
        return _Rule(rule, self, decay_kind), _Descend()

    def options(self) -> dict[str, Any]:
        """What ρ/‖v‖ was at the latest step."""
        return {"msam_size": 0.0}

    def save(self, groups: list[dict[str, Any]]) -> None:
        """The size of the perturbation in the weights."""
        for group in groups:
            group["msam_size"] = self.size

    def load(self, groups: list[dict[str, Any]]) -> None:
        """Likewise."""
        self._loaded, self._sizes = float(groups[0].get("msam_size", 0.0)) if groups else 0.0, {}

    @property
    def size(self) -> float:
        """ρ/‖v‖ in the weights; waits for the device."""
        return next((float(sizes[0]) for sizes in self._sizes.values()), self._loaded)

    def stage(self, group: dict[str, Any]) -> Stage:
        """Always the same."""
        return self._stage

    def device_scalars(self, device: torch.device) -> tuple[Tensor, ...]:
        """The size after this step."""
        return (self._size(device)[1],)

    def former(self, device: torch.device) -> Tensor:
        """The size in the weights."""
        return self._size(device)[0]

    def prepare(self, work: Work) -> None:
        """Measure the momentum that this step will have."""
        for tensor, state in zip(work.tensors, work.states, strict=True):
            if (own := state.pop("msam_size", None)) is not None:  # it was absent: as if it had not been
                momentum = _momentum(state).to(tensor.dtype)
                tensor.add_(momentum * (own - self.former(tensor.device)).to(tensor.dtype))
        result = Measured(*measured(work, self._limit, NormSpec(momentum=True)))
        size = torch.where(result.bad == 0, self.rho / (result.norm + TINY), 0.0)
        for device in dict.fromkeys(batch.device for batch, _ in work.batches):
            self._size(device)[1].copy_(size, non_blocking=True)

    def finish(self, work: Work, flags: dict[torch.device, Tensor]) -> None:
        """What has been put in is in, unless the step was skipped; who was absent keeps what it has."""
        for tensor, state in work.absent:
            if any(name in state for name in weight_averages.FIRST_MOMENTS):
                state.setdefault("msam_size", self.former(tensor.device).clone())
        for device in dict.fromkeys(batch.device for batch, _ in work.batches):
            former, new = self._size(device)
            former.copy_(torch.where(flags[device][0] == 0, new, former) if device in flags else new)

    def begun(self, step: int) -> bool:
        """After the first step."""
        return step > 0

    def shown(self, parameter: Tensor, state: dict[str, Any]) -> Tensor:
        """The weight itself."""
        momentum = next(state[name] for name in weight_averages.FIRST_MOMENTS if name in state)
        return parameter.detach() + momentum.to(parameter.dtype) * float(state.get("msam_size", self.size))

    def _size(self, device: torch.device) -> Tensor:
        if device not in self._sizes:
            start = torch.tensor([self.size, 0.0], dtype=scalar_dtype(device), device=device)
            self._sizes[device] = start
        return self._sizes[device]

    def _limit(self, device: torch.device) -> Tensor:
        """No clipping, no scale: the stages before have seen to both."""
        if device not in self._limits:
            self._limits[device] = torch.tensor([torch.inf, 1.0], dtype=scalar_dtype(device), device=device)
        return self._limits[device]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start from the size in the weights."""
        return {**vars(self), "_sizes": {}, "_limits": {}, "_loaded": self.size}


def _momentum(state: dict[str, Any]) -> Tensor:
    return layout.local(next(state[name] for name in weight_averages.FIRST_MOMENTS if name in state))


class _Rule(Component):
    """An update rule of which MSAM's form is taken."""

    phase = Phase.RULE

    def __init__(self, rule: Component, msam: MSAM, decay_kind: str | None) -> None:
        self._rule, self._msam, self._decay_kind = rule, msam, decay_kind

    def stage(self, group: dict[str, Any]) -> Stage:
        """The rule's, which is another function with one more scalar."""
        stage = self._rule.stage(group)
        if stage is None or stage.reference not in _RULES:
            raise ValueError(
                "MSAM needs momentum: use SGD(momentum=0.9), Adam or AdamW, "
                f"got {type(self._rule).__name__} with {stage.kernel if stage else None}"
            )
        if group.get("decay", self._decay_kind) == "cautious":
            raise ValueError("MSAM does not go with decay='cautious'; use 'decoupled'")
        return replace(stage, device_scalars=("prev_perturbation",), momentum=True)

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """Those of the rule."""
        return self._rule.step_scalars(group, step)

    def device_scalars(self, device: torch.device) -> tuple[Tensor, ...]:
        """The size of the perturbation to take out."""
        return (self._msam.former(device),)


class _Descend(Component):
    """Takes the update off the weight and leaves the momentum."""

    phase = Phase.DESCEND
    _stage = Stage("rules.descend_with_momentum", rules.descend_with_momentum)

    def stage(self, group: dict[str, Any]) -> Stage:
        """Always the same."""
        return self._stage
