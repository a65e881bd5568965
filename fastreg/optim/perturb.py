"""Passes that perturb weights, and the pass that restores them from their backups.

perturb  read weight and gradient (of SAM); write the perturbed weight and the backup: 16 bytes in float32
restore  read the backup, write the weight; a fastreg optimizer reads the backup in its own pass instead
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..common.random import Purpose
from ..common.validation import check_choice
from ..engine.batch import NormSpec
from ..engine.component import Component, Phase
from ..engine.device_scalars import NO_CLIPPING, DeviceScalars
from ..engine.grad_norm import measure_norm
from ..engine.multi_tensor_optimizer import MultiTensorOptimizer
from ..engine.plan import Plan
from ..engine.rounding import Rounding
from ..engine.stage import Stage, Storage
from ..engine.state import BACKUP
from ..reference import ascent as reference
from ..reference.norm import Measured
from .msam import TINY


class _ReadBackup(Component):
    """Copies the backup to the parameter."""

    phase = Phase.DESCEND
    _storage = Storage(sources=(BACKUP.name,), buffers=(BACKUP,))

    def __init__(self) -> None:
        self.unless: dict[torch.device, Tensor] = {}

    def storage(self, group: dict[str, Any], dtype: torch.dtype) -> Storage | None:
        return self._storage

    def skip(self, device: torch.device) -> Tensor | None:
        return self.unless.get(device)


class Restore(MultiTensorOptimizer):
    """The pass that copies the backups of parameters back to them; its groups are another optimizer's."""

    def __init__(self) -> None:
        self._component = _ReadBackup()
        self._set_components((self._component,), seed=0)
        self.__setstate__({"defaults": {}, "state": defaultdict(dict), "param_groups": []})

    def run(self, backups: dict[Tensor, Tensor], unless: dict[torch.device, Tensor]) -> None:
        """Copies the backup of each parameter to it; `unless` is that of `Perturb.restore`."""
        self._component.unless = unless
        for p, backup in backups.items():
            self.state[p][BACKUP.name] = backup
        self._run_step(self._operands(backups).with_gradient())  # of which the storage reads nothing
        for p in backups:
            del self.state[p][BACKUP.name]


def perturbed_rounding(rounding: str) -> Rounding:
    """Returns the rounding of perturbed 16-bit weights, whose last digit mostly exceeds a perturbation."""
    check_choice("rounding", rounding, ("stochastic", "nearest"))
    return Rounding(rounding, Purpose.PERTURBATION)


class Perturb(MultiTensorOptimizer):
    """Base of the passes that perturb weights, and restore them bit for bit."""

    def reset_cache(self) -> None:
        """Forgets all that is kept between steps, the pass that restores among it."""
        super().reset_cache()
        self._restore: Restore | None = None

    def restore(self, parameters: Iterable[Tensor], unless: dict[torch.device, Tensor] | None = None) -> None:
        """Restores perturbed weights from their backups.

        They stay as they are where a flag `unless` of their device, `[1]`, is not 0.
        """
        backups = {p: self.state[p][BACKUP.name] for p in parameters}
        if not backups:
            return
        self._restore = self._restore or Restore()
        self._restore.param_groups = self.param_groups
        self._restore.run(backups, unless or {})
        # The random numbers of the next perturbation depend on this count of passes in both directions.
        torch._foreach_add_([self.state[p]["step"] for p in backups], 1)


class _ScaleByWeights(Component):
    """Scales gradients by |p| + η where a group is `adaptive`."""

    phase = Phase.PENALTY
    _stage = Stage("ascent.adaptive", reference.adaptive, step_scalars=2)
    enabled = False
    """Whether any group is adaptive: then all groups have the stage, so that they share one norm."""

    def stage(self, group: dict[str, Any]) -> Stage | None:
        return self._stage if self.enabled else None

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        return (1.0, float(group["eta"])) if group["adaptive"] else (0.0, 1.0)


class _Ascend(Component):
    """Moves weights by ρ along their gradients."""

    phase = Phase.RULE
    _plain = Stage("ascent.perturb", reference.perturb, (BACKUP,), ("inverse_norm",), step_scalars=1)
    _adaptive = Stage(
        "ascent.perturb_adaptive", reference.perturb_adaptive, (BACKUP,), ("inverse_norm",), step_scalars=3
    )

    def __init__(self, scale: _ScaleByWeights) -> None:
        self._scale = scale
        self._inverse_norms = DeviceScalars(0.0)
        self.result: Measured | None = None

    def stage(self, group: dict[str, Any]) -> Stage:
        return self._adaptive if self._scale.enabled else self._plain

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        scale = self._scale.step_scalars(group, step) if self._scale.enabled else ()
        return (*scale, float(group["rho"]))

    def device_scalars(self, device: torch.device) -> tuple[Tensor, ...]:
        return (self._inverse_norms[device],)

    def prepare(self, plan: Plan) -> None:
        spec = NormSpec(stages=int(self._scale.enabled))
        self.result = Measured(*measure_norm(plan, NO_CLIPPING.__getitem__, spec))
        inverse = torch.where(self.result.bad == 0, 1 / (self.result.norm + TINY), 0.0)
        for device in plan.devices:
            self._inverse_norms[device].copy_(inverse, non_blocking=True)


class PerturbByGradient(Perturb):
    """Moves weights along their gradients, as SAM and FGM do.

    The groups, with `rho`, `adaptive` and `eta`, belong to another optimizer.
    """

    _KEPT = (*Perturb._KEPT, "_scale", "_ascend")

    def __init__(self, groups: list[dict[str, Any]], rounding: str) -> None:
        self._scale = _ScaleByWeights()
        self._ascend = _Ascend(self._scale)
        self._set_components((self._scale, self._ascend, perturbed_rounding(rounding)), seed=0)
        self.__setstate__({"defaults": {}, "state": defaultdict(dict), "param_groups": groups})
        self._scale.enabled = self._adaptive

    @property
    def _adaptive(self) -> bool:
        return any(group["adaptive"] and group["rho"] for group in self.param_groups)

    @property
    def measured(self) -> Measured | None:
        """The norm of the latest gradients, and whether they were not finite and nothing was perturbed."""
        return self._ascend.result

    def perturb(self) -> list[Tensor]:
        """Perturbs all weights that have gradients and a ρ, and returns their parameters."""
        self._scale.enabled, self._ascend.result = self._adaptive, None
        operands = self._operands().with_gradient()
        operands = operands.only(bool(self.param_groups[i]["rho"]) for i in operands.groups)
        self._run_step(operands)
        return operands.parameters
