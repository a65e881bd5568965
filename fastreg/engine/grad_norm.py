"""Measures the norm of all gradients, once per step for all components that need it.

Clipping scales by it, loss scaling and the check for NaN and infinity follow from it, relative noise takes
its size from it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference import regularizers as reference
from ..reference.norm import Measured
from ..reference.step import scalar_dtype
from .batch import Batch, NormSpec
from .component import Component, Phase
from .device_scalars import DeviceScalars
from .grad_scaler import UNSCALED
from .launch import combine, measure
from .layout import Shards
from .plan import Plan
from .stage import Stage


class GradNorm(Component):
    """Scales gradients by one factor that clips and unscales, and decides when to skip a step.

    Attributes:
        nonfinite: What to do about gradients that are not finite, `"propagate"`, `"skip"` or `"raise"`.
        clip: The `ClipNorm` of the optimizer, if it has one.
        needed_by_others: Whether another component reads the norm.
        scaling: How the gradients of this step are scaled.
        stages_before: How many stages come before: gradients are measured as these leave them.
    """

    phase = Phase.CLIP
    reads_gradients = False  # it measures them with their noise
    _stage = Stage("regularizers.scale", reference.scale, device_scalars=("factor",))

    def __init__(self) -> None:
        self.nonfinite, self.needed_by_others = "propagate", False
        self.clip: Any = None
        self.scaling = UNSCALED
        self.stages_before = 0
        self._results = DeviceScalars(*[0.0] * 5)
        self._limits = DeviceScalars(math.inf, 1.0)

    @property
    def norm(self) -> Tensor | None:
        """The norm at the latest step: 0-d, float64, on the device of the first parameters; `None` before."""
        return next((Measured(*result).norm.clone() for result in self._results.values()), None)

    def stage(self, group: dict[str, Any]) -> Stage | None:
        """Returns the stage if there is anything to scale by."""
        return self._stage if self.clip or self.scaling.scale is not None else None

    def device_scalars(self, device: torch.device) -> tuple[Tensor, ...]:
        """Returns the factor to scale by."""
        return (Measured(*self._results[device]).factor,)

    def prepare(self, plan: Plan) -> None:
        """Measures one norm over everything, if any component needs it."""
        devices, record = plan.devices, self.scaling.record
        guards = self.nonfinite != "propagate"
        if self.clip or self.needed_by_others or guards or record is not None:
            largest = bool(self.clip) and self.clip.norm_type == math.inf
            spec = NormSpec(self.stages_before, "largest" if largest else "l2")
            result = measure_norm(plan, self._limit, spec)
        elif self.scaling.scale is not None:  # checked by the scaler, nothing else to know
            result = torch.zeros(5, dtype=scalar_dtype(devices[0]), device=devices[0])
            result[4] = self._limit(devices[0])[1]
        else:
            return
        for device in devices:
            self._results[device].copy_(result, non_blocking=True)
            plan.measured[device] = Measured(*self._results[device])
        if record is not None:
            found_inf, bad = self.scaling.found_inf, result[0].float()
            record[devices[0]] = bad if found_inf is None else torch.maximum(bad, found_inf.to(bad))

    def skip(self, device: torch.device) -> Tensor | None:
        """Returns the flag of the scaler, or that of the norm."""
        found_inf = self.scaling.found_inf
        flags = [] if found_inf is None else [found_inf.to(device, scalar_dtype(device)).reshape(1)]
        if self.nonfinite != "propagate" or self.scaling.record is not None:
            flags.append(self._results[device][:1])
        return torch.stack(flags).amax(0) if len(flags) > 1 else flags[0] if flags else None

    def _limit(self, device: torch.device) -> Tensor:
        """Returns (max_norm, 1 / scale) on the device; `max_norm` may be changed between steps."""
        initial = (self.clip.max_norm if self.clip else math.inf, 1.0)
        if self._limits.initial != initial:
            self._limits = DeviceScalars(*initial)
        limit, scale = self._limits[device], self.scaling.scale
        if scale is None:
            return limit
        inverse = scale.to(device, limit.dtype).reshape(()).reciprocal()
        return torch.stack((limit[0], inverse))

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are scaled by nothing."""
        return {**vars(self), "scaling": UNSCALED}


def measure_norm(plan: Plan, limit: Callable[[torch.device], Tensor], spec: NormSpec) -> Tensor:
    """Measures one norm over everything: over devices by copying a scalar, over shards by summing one.

    Args:
        plan: The batches of the step.
        limit: Returns (max_norm, 1 / scale) on a device.
        spec: The norm to measure.

    Returns:
        `reference.norm.Measured`, on the device of the first batch.
    """
    parts: dict[tuple[torch.device, Shards | None], list[Batch]] = {}
    for batch in plan.batches:
        parts.setdefault((batch.device, batch.shards), []).append(batch)
    results = {key: measure(batches, limit(key[0]), spec) for key, batches in parts.items()}
    (home, shards), result = next(iter(results.items()))
    if len(results) == 1 and shards is None:
        return result
    totals, largest = [], spec.kind == "largest"
    for (_, shards), part in results.items():
        # A maximum over processes may lose NaN, but no infinity.
        total = part[1].nan_to_num(nan=math.inf, posinf=math.inf) if largest else part[1].clone()
        if shards is not None:
            shards.all_reduce(total, largest)
        totals.append(total.to(home))
    return combine(totals, limit(home), largest)
