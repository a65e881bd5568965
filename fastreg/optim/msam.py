"""Momentum-SAM: sharpness-aware minimization with one backward pass, inside the step.

The weight in memory is w - c v, with the momentum v and c = ρ/‖v‖.  A step measures the momentum that it
will make (one read of momentum and gradient).  Then, in one pass, it adds the last step's c v, updates w and
subtracts the new c v.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..common.validation import check_range
from ..engine import layout
from ..engine.batch import NormSpec
from ..engine.component import Component, Phase
from ..engine.device_scalars import NO_CLIPPING, DeviceScalars
from ..engine.grad_norm import measure_norm
from ..engine.plan import Plan
from ..engine.stage import Stage
from ..reference import ascent, rules
from ..reference.norm import Measured
from .weight_averages import FIRST_MOMENTS, Average

TINY = 1e-12
"""Added to norms that are divided by, as in the published implementations."""

_RULES = (rules.sgd_momentum, rules.sgd_nesterov, rules.adam, rules.adam_amsgrad)
"""References of the rules whose first buffer is the momentum that they step along."""


class MSAM(Average):
    """Momentum-SAM: gradients are taken at w - ρ v/‖v‖ with the momentum v; one backward pass a step.

    For `SGD` with momentum, `Adam` and `AdamW` (v is `exp_avg`); works with accumulation, loss scaling and
    training loops that know nothing of it.  While training, parameters hold the perturbed weights, which is
    also what a model saved then holds; `optimizer.eval()`, or `with optimizer.averaged("msam"):`, swaps in
    the weights themselves.  Averages and Lookahead work on the weights themselves.  A parameter that has no
    gradient at a step keeps its perturbation.

    Args:
        rho: Radius ρ of the perturbation over all parameters; ≥ 0.  May be changed between steps.  Larger
            than SAM's, 3 in the paper's experiments, since momentum is rarely aligned with the gradient.

    Raises:
        ValueError: If rho is negative or not finite.

    Reference:
        Becker, Altrock, Risse 2024, "Momentum-SAM: sharpness aware minimization without computational
        overhead".
    """

    phase = Phase.PERTURB
    reads_gradients = False  # it measures a momentum with noise
    name = "msam"
    computed = True
    _stage = Stage("ascent.perturb_momentum", ascent.perturb_momentum, device_scalars=("perturbation",))

    def __init__(self, rho: float = 0.3) -> None:
        self.rho = check_range("rho", rho, 0)
        self._perturbations = DeviceScalars(0.0, 0.0)  # in the weight, and after this step

    def adapt(self, rule: Component, decay_kind: str | None, optimizer: str) -> Component:
        """Returns the component that replaces an update rule, and hands on its momentum."""
        return _Rule(rule, self, decay_kind, optimizer)

    def options(self) -> dict[str, Any]:
        """Returns ρ/‖v‖ before the first step."""
        return {"msam_size": 0.0}

    def save(self, groups: list[dict[str, Any]]) -> None:
        """Saves the size of the perturbation in the weights."""
        for group in groups:
            group["msam_size"] = self.size

    def load(self, groups: list[dict[str, Any]]) -> None:
        """Loads the size of the perturbation in the weights."""
        self._perturbations = DeviceScalars(float(groups[0].get("msam_size", 0.0)) if groups else 0.0, 0.0)

    @property
    def size(self) -> float:
        """The ρ/‖v‖ in the weights; reading it waits for the device."""
        return next(
            (float(value[0]) for value in self._perturbations.values()), self._perturbations.initial[0]
        )

    def device_scalars(self, device: torch.device) -> tuple[Tensor, ...]:
        """Returns the size of the perturbation after this step."""
        return (self._perturbations[device][1],)

    def prev_perturbation(self, device: torch.device) -> Tensor:
        """Returns the size of the perturbation in the weights."""
        return self._perturbations[device][0]

    def prepare(self, plan: Plan) -> None:
        """Measures the momentum that this step will have."""
        for tensor, state in zip(plan.tensors, plan.states, strict=True):
            if (prev := state.pop("msam_size", None)) is not None:  # from before it had no gradient
                momentum = layout.local(_momentum(state)).to(tensor.dtype)
                tensor.add_(momentum * (prev - self.prev_perturbation(tensor.device)).to(tensor.dtype))
        result = Measured(*measure_norm(plan, NO_CLIPPING.__getitem__, NormSpec(kind="momentum")))
        size = torch.where(result.bad == 0, self.rho / (result.norm + TINY), 0.0)
        for device in plan.devices:
            self._perturbations[device][1].copy_(size, non_blocking=True)

    def finish(self, plan: Plan, flags: dict[torch.device, Tensor]) -> None:
        """Commits the new size unless the step was skipped; parameters without gradient keep theirs."""
        for tensor, state in plan.absent:
            if any(name in state for name in FIRST_MOMENTS):
                state.setdefault("msam_size", self.prev_perturbation(tensor.device).clone())
        for device in plan.devices:
            prev, new = self._perturbations[device]
            prev.copy_(torch.where(flags[device][0] == 0, new, prev) if device in flags else new)

    def begun(self, step: int) -> bool:
        """Returns whether a step has perturbed the weight."""
        return step > 0

    def value(self, parameter: Tensor, state: dict[str, Any]) -> Tensor:
        """Returns the weight without the perturbation."""
        momentum = _momentum(state).to(parameter.dtype)
        return parameter.detach() + momentum * float(state.get("msam_size", self.size))

    def __getstate__(self) -> dict[str, Any]:
        """Returns what copies and pickles keep: the size in the weights, on no device."""
        return {**vars(self), "_perturbations": DeviceScalars(self.size, 0.0)}


def _momentum(state: dict[str, Any]) -> Tensor:
    return next(state[name] for name in FIRST_MOMENTS if name in state)


class _Rule(Component):
    """An update rule that restores the weight before, and hands on its momentum."""

    phase = Phase.RULE

    def __init__(self, rule: Component, msam: MSAM, decay_kind: str | None, optimizer: str) -> None:
        self._rule, self._msam, self._decay_kind, self._optimizer = rule, msam, decay_kind, optimizer

    def stage(self, group: dict[str, Any]) -> Stage:
        stage = self._rule.stage(group)
        if stage is None or stage.reference not in _RULES:
            raise ValueError(f"MSAM needs momentum: SGD(momentum=0.9), Adam or AdamW; got {self._optimizer}")
        if group.get("decay", self._decay_kind) == "cautious":
            raise ValueError("MSAM does not go with decay='cautious'; use 'decoupled'")
        return replace(stage, device_scalars=("prev_perturbation",), momentum=True)

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        return self._rule.step_scalars(group, step)

    def device_scalars(self, device: torch.device) -> tuple[Tensor, ...]:
        return (self._msam.prev_perturbation(device),)
