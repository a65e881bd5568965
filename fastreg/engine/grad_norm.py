"""The norm of all gradients, measured once per step for whoever needs it.

Clipping scales by it, loss scaling and the check for NaN and infinity follow from it, relative noise takes
its size from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference import regularizers as reference
from ..reference.norm import Measured
from ..reference.step import scalar_dtype
from .batch import Batch, NormSpec
from .component import Component, Phase, Work
from .grad_scaler import Scaling
from .launch import combine, measure
from .layout import Shards
from .stage import Stage


class GradNorm(Component):
    """Scales gradients by one factor that clips and unscales, and says when to skip a step.

    Args:
        clip: The `ClipNorm` of the optimizer, if it has one.
        needed: Whether another component reads the norm.
        nonfinite: What to do about gradients that are not finite, `"propagate"`, `"skip"` or `"raise"`.

    Attributes:
        behind: How many stages come before: gradients are measured as these leave them.
    """

    phase = Phase.CLIP
    _stage = Stage("regularizers.scale", reference.scale, device_scalars=("factor",))

    def __init__(self, clip: Any, needed: bool, nonfinite: str) -> None:
        self.clip, self._needed, self._guards = clip, needed, nonfinite != "propagate"
        self.scaling = Scaling()
        self.behind = 0
        self._results: dict[torch.device, Tensor] = {}
        self._limits: dict[torch.device, tuple[float, Tensor]] = {}

    @property
    def norm(self) -> Tensor | None:
        """The norm at the latest step: 0-d, float64, on the device of the first parameters; `None` before."""
        return next((Measured(*result).norm.clone() for result in self._results.values()), None)

    @property
    def _measures(self) -> bool:
        return bool(self.clip) or self._needed or self._guards or self.scaling.record is not None

    def stage(self, group: dict[str, Any]) -> Stage | None:
        """Only where there is anything to scale by."""
        return self._stage if self.clip or self.scaling.scale is not None else None

    def device_scalars(self, device: torch.device) -> tuple[Tensor, ...]:
        """The factor."""
        return (Measured(*self._result(device)).factor,)

    def prepare(self, work: Work) -> None:
        """One norm over everything: over devices by copying a scalar, over shards by summing one."""
        devices = list(dict.fromkeys(batch.device for batch, _ in work.batches))
        if self._measures:
            result = self._measured(work)
        elif self.scaling.scale is not None:  # checked by the scaler, nothing else to know
            result = torch.zeros(5, dtype=scalar_dtype(devices[0]), device=devices[0])
            result[4] = self._limit(devices[0])[1]
        else:
            return
        for device in devices:
            self._result(device).copy_(result, non_blocking=True)
            work.measured[device] = Measured(*self._result(device))
        if self.scaling.record is not None:
            found = self.scaling.found_inf
            bad = result[0].float()
            self.scaling.record[devices[0]] = bad if found is None else torch.maximum(bad, found.to(bad))

    def _measured(self, work: Work) -> Tensor:
        largest = bool(self.clip) and self.clip.norm_type == math.inf
        return measured(work, self._limit, NormSpec(self.behind, largest=largest))

    def skip(self, device: torch.device) -> Tensor | None:
        """What the scaler found, or what the norm tells."""
        found = self.scaling.found_inf
        flags = [] if found is None else [found.to(device, scalar_dtype(device)).reshape(1)]
        if self._guards or self.scaling.record is not None:
            flags.append(self._result(device)[:1])
        return torch.stack(flags).amax(0) if len(flags) > 1 else flags[0] if flags else None

    def _result(self, device: torch.device) -> Tensor:
        if device not in self._results:
            self._results[device] = torch.zeros(5, dtype=scalar_dtype(device), device=device)
        return self._results[device]

    def _limit(self, device: torch.device) -> Tensor:
        """(max_norm, 1 / scale) on the device; `max_norm` may be changed between steps."""
        max_norm = self.clip.max_norm if self.clip else math.inf
        if device not in self._limits or self._limits[device][0] != max_norm:
            limit = torch.tensor([max_norm, 1.0], dtype=scalar_dtype(device), device=device)
            self._limits[device] = max_norm, limit
        limit, scale = self._limits[device][1], self.scaling.scale
        if scale is None:
            return limit
        inverse = scale.to(device, limit.dtype).reshape(()).reciprocal()
        return torch.stack((limit[0], inverse))

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles measure anew."""
        return {**vars(self), "scaling": Scaling(), "_results": {}, "_limits": {}}


def measured(work: Work, limit: Callable[[torch.device], Tensor], of: NormSpec) -> Tensor:
    """One norm over everything: over devices by copying a scalar, over shards by summing one.

    Args:
        work: What the pass works on.
        limit: (max_norm, 1 / scale) on a device.
        of: What is measured.

    Returns:
        `reference.norm.Measured`, on the device of the first batch.
    """
    parts: dict[tuple[torch.device, Shards | None], list[Batch]] = {}
    for batch, shards in work.batches:
        parts.setdefault((batch.device, shards), []).append(batch)
    found = {(device, shards): measure(part, limit(device), of) for (device, shards), part in parts.items()}
    (home, shards), result = next(iter(found.items()))
    if len(found) > 1 or shards is not None:
        totals = []
        for (_, shards), part in found.items():
            # A maximum over processes may lose NaN, but no infinity.
            total = part[1].nan_to_num(nan=math.inf, posinf=math.inf) if of.largest else part[1].clone()
            if shards is not None:
                shards.all_reduce(total, of.largest)
            totals.append(total.to(home))
        result = combine(totals, limit(home), of.largest)
    return result
