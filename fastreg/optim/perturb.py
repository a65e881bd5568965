"""Perturbations as passes of their own: weights leave, and their backups bring them back.

climb    read weight and gradient (of SAM); write the perturbed weight and the backup: 16 bytes in float32
restore  read the backup, write the weight; a fastreg optimizer reads the backup in its own pass instead
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..common.random import Purpose
from ..engine.batch import NormSpec
from ..engine.component import Component, Phase, Work
from ..engine.grad_norm import measured
from ..engine.multi_tensor_optimizer import MultiTensorOptimizer, Operands
from ..engine.rounding import Rounding
from ..engine.stage import Stage, Storage
from ..engine.state import BACKUP
from ..reference import ascent as reference
from ..reference.norm import Measured
from ..reference.step import scalar_dtype
from .msam import TINY


class Mode:
    """What the pass does this time, and to whom: its components and itself look here."""

    restoring = False
    adaptive = False  # any group
    unless: dict[torch.device, Tensor]  # `[1]`, not 0: leave them

    def __init__(self) -> None:
        self.unless = {}


class Leaving(Component):
    """Base of components that perturb."""

    def __init__(self, mode: Mode) -> None:
        self._mode = mode

    def due(self, group: dict[str, Any], step: int) -> bool:
        """While weights climb."""
        return not self._mode.restoring


class _Adaptive(Leaving):
    """Scales gradients by the weights where a group is `adaptive`."""

    phase = Phase.PENALTY
    _stage = Stage("ascent.adaptive", reference.adaptive, step_scalars=2)

    def stage(self, group: dict[str, Any]) -> Stage | None:
        """In every group or none, so that all share one norm."""
        return self._stage if self._mode.adaptive else None

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """Of |p| and of 1."""
        return (1.0, float(group["eta"])) if group["adaptive"] else (0.0, 1.0)


class _Perturb(Leaving):
    """Adds ρ times the direction of the gradients."""

    phase = Phase.RULE
    _plain = Stage("ascent.perturb", reference.perturb, (BACKUP,), device_scalars=("size",), step_scalars=1)
    _adaptive = Stage(
        "ascent.perturb_adaptive",
        reference.perturb_adaptive,
        (BACKUP,),
        device_scalars=("size",),
        step_scalars=3,
    )

    def __init__(self, mode: Mode) -> None:
        super().__init__(mode)
        self._sizes: dict[torch.device, Tensor] = {}
        self._limits: dict[torch.device, Tensor] = {}
        self.result: Measured | None = None

    def stage(self, group: dict[str, Any]) -> Stage:
        """Adaptive where any group is."""
        return self._adaptive if self._mode.adaptive else self._plain

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """ρ, behind what scales."""
        scales = _Adaptive.step_scalars(self, group, step) if self._mode.adaptive else ()  # type: ignore[arg-type]
        return (*scales, float(group["rho"]))

    def device_scalars(self, device: torch.device) -> tuple[Tensor, ...]:
        """One over the norm; 0 where that is not finite."""
        return (self._size(device),)

    def prepare(self, work: Work) -> None:
        """One norm over everything."""
        if self._mode.restoring:
            return
        of = NormSpec(stages=int(self._mode.adaptive))
        self.result = Measured(*measured(work, self._limit, of))
        size = torch.where(self.result.bad == 0, 1 / (self.result.norm + TINY), 0.0)
        for device in dict.fromkeys(batch.device for batch, _ in work.batches):
            self._size(device).copy_(size, non_blocking=True)

    def _size(self, device: torch.device) -> Tensor:
        if device not in self._sizes:
            self._sizes[device] = torch.zeros((), dtype=scalar_dtype(device), device=device)
        return self._sizes[device]

    def _limit(self, device: torch.device) -> Tensor:
        if device not in self._limits:
            self._limits[device] = torch.tensor([torch.inf, 1.0], dtype=scalar_dtype(device), device=device)
        return self._limits[device]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles measure anew."""
        return {**vars(self), "_sizes": {}, "_limits": {}}


class _Rounding(Rounding):
    """Of perturbed 16-bit weights: a perturbation is mostly smaller than half their last place."""

    def __init__(self, rounding: str, mode: Mode) -> None:
        super().__init__(rounding, Purpose.PERTURBATION)
        self._mode = mode

    def due(self, group: dict[str, Any], step: int) -> bool:
        """While weights climb."""
        return not self._mode.restoring


class _Restore(Component):
    """Writes the backup to the parameter."""

    phase = Phase.DESCEND
    _storage = Storage(sources=(BACKUP.name,), buffers=(BACKUP,))

    def __init__(self, mode: Mode) -> None:
        self._mode = mode

    def due(self, group: dict[str, Any], step: int) -> bool:
        """While they come back."""
        return self._mode.restoring

    def storage(self, group: dict[str, Any], dtype: torch.dtype) -> Storage | None:
        """From the backup as it is."""
        return self._storage

    def skip(self, device: torch.device) -> Tensor | None:
        """Where a step has brought them back."""
        return self._mode.unless.get(device)


class Excursion(MultiTensorOptimizer):
    """Base of what perturbs weights, and brings them back bit for bit.

    A subclass says by `_leaving` whom it perturbs.
    """

    _mode: Mode

    def _equip(self, mode: Mode, leaving: Iterable[Component], rounding: str, seed: int | None) -> None:
        """Put the components together: those that perturb, and what brings weights back.

        Args:
            mode: What they look at.
            leaving: The components that perturb.
            rounding: `"stochastic"` or `"nearest"`, of perturbed 16-bit weights.
            seed: Base of the random numbers.
        """
        self._mode = mode
        self._set_components((*leaving, _Rounding(rounding, mode), _Restore(mode)), seed)

    _KEPT = (*MultiTensorOptimizer._KEPT, "_mode")

    def climb(self) -> list[Tensor]:
        """Perturb.

        Returns:
            Whose weights are in their backups now.
        """
        self._mode.restoring, self._mode.unless = False, {}
        operands = self._leaving(self._operands())
        self._run_step(operands)
        return operands.parameters

    def restore(self, parameters: Iterable[Tensor], unless: dict[torch.device, Tensor] | None = None) -> None:
        """Bring weights back from their backups.

        Args:
            parameters: Whose.
            unless: For a device, `[1]`: not 0 if they are to stay as they are.
        """
        perturbed = set(map(id, parameters))
        if perturbed:
            self._mode.restoring, self._mode.unless = True, unless or {}
            operands = self._operands()
            operands = operands._replace(gradients=operands.parameters)
            self._run_step(operands.only(id(p) in perturbed for p in operands.parameters))

    def _leaving(self, every: Operands) -> Operands:
        raise NotImplementedError

    def chain(self, group: dict[str, Any], dtype: torch.dtype, variant: Any = None) -> Any:
        """What is done this time: perturbing and restoring exclude each other."""
        return super().chain(group, dtype, variant or self._variant(0, 0, False))


class Ascent(Excursion):
    """SAM's pass over parameter groups with `rho`, `adaptive` and `eta` that belong to another optimizer.

    Args:
        groups: The groups.
        rounding: `"stochastic"` or `"nearest"`.
    """

    def __init__(self, groups: list[dict[str, Any]], rounding: str) -> None:
        mode = Mode()
        self._perturb = _Perturb(mode)
        self._equip(mode, (_Adaptive(mode), self._perturb), rounding, seed=0)
        self.__setstate__({"defaults": {}, "state": defaultdict(dict), "param_groups": groups})

    _KEPT = (*Excursion._KEPT, "_perturb")

    @property
    def bad(self) -> Tensor | None:
        """1 if the gradients of the latest climb were not finite, and nothing climbed; 0-d, on the device."""
        return None if self._perturb.result is None else self._perturb.result.bad

    @property
    def norm(self) -> Tensor | None:
        """The norm by which the latest climb was divided: 0-d, on the device."""
        return None if self._perturb.result is None else self._perturb.result.norm

    def climb(self) -> list[Tensor]:
        """Perturb all that have gradients and a ρ.

        Returns:
            Whose weights are in their backups now.
        """
        self._mode.adaptive = any(group["adaptive"] and group["rho"] for group in self.param_groups)
        self._perturb.result = None
        return super().climb()

    def _leaving(self, every: Operands) -> Operands:
        rho = [bool(group["rho"]) for group in self.param_groups]
        return every.only(
            g is not None and rho[i] for g, i in zip(every.gradients, every.groups, strict=True)
        )
