"""A component: what an optimizer is made of.

A component says which stage it puts into the chain, in which phase, and works out on the host, in double, the
numbers the stage needs this step.  What needs a reduction over gradients first does it in `prepare` and
leaves a device scalar for its stage to read.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ..reference.norm import Measured
from .batch import Batch
from .layout import Shards
from .stage import Stage, Storage


class Phase(IntEnum):
    """The order of stages; the order in which regularizers are given matters only inside a phase."""

    PRIVACY = -1
    CLIP = 0
    NOISE = 1
    PENALTY = 2
    RULE = 3
    DECAY = 4
    DESCEND = 5
    PROXIMAL = 6
    LOOKAHEAD = 7
    AVERAGE = 8
    PERTURB = 9


@dataclass
class Work:
    """What a step has to do, as `Component.prepare` sees it.

    Args:
        batches: The parameters that have gradients, and how each batch is sharded.
        elements: How many elements they have, shards elsewhere included.
        tensors: Their local tensors.
        states: Their states.
        absent: Local tensors and states of the others that have been stepped before.
        measured: What is known of all gradients together, on each device, where anything asked for it.
    """

    batches: list[tuple[Batch, Shards | None]]
    elements: int
    tensors: list[Tensor]
    states: list[dict[str, Any]]
    absent: list[tuple[Tensor, dict[str, Any]]] = field(default_factory=list)
    measured: dict[torch.device, Measured] = field(default_factory=dict)


class Component:
    """Base of update rules and regularizers.

    Subclasses set `phase` and override what they need, most of them `stage` and `step_scalars`.
    """

    phase: Phase

    @property
    def needs_norm(self) -> bool:
        """Whether `prepare` reads the norm of all gradients from `Work.measured`."""
        return False

    def stage(self, group: dict[str, Any]) -> Stage | None:
        """The stage for the parameters of a group; may depend on what the group switches on."""
        return None

    def due(self, group: dict[str, Any], step: int) -> bool:
        """Whether the stage takes part in a step; state is kept in any case.

        Where the device counts, nobody on the host knows: the stage always takes part then, and
        `step_scalars` say what it does.
        """
        return True

    def options(self) -> dict[str, Any]:
        """Keys that a group gets from the component unless it has them, and that are saved with it."""
        return {}

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """The numbers of the stage at a step (the first is 1), as many as `stage.step_scalars`.

        Where the device counts the steps (`capturable`), `step` is a float64 tensor with an element for each
        parameter; the same arithmetic then gives tensors.
        """
        return ()

    def rng_keys(self, seed: int) -> tuple[int, ...]:
        """The integers of the stage, as many as `stage.rng_keys`, from the optimizer's seed."""
        return ()

    def device_scalars(self, device: torch.device) -> tuple[Tensor, ...]:
        """The device scalars of the stage, float64: the same tensors at every step, written by `prepare`."""
        return ()

    def prepare(self, work: Work) -> None:
        """Called once per step before any parameter changes, with all gradients and how they are sharded."""

    def finish(self, work: Work, flags: dict[torch.device, Tensor]) -> None:
        """Called once per step after the parameters have changed.

        Args:
            work: As for `prepare`.
            flags: For each device that may skip the step, `[1]`: not 0 if it did.
        """

    def save(self, groups: list[dict[str, Any]]) -> None:
        """Called before a checkpoint is made: bring what the component holds into the groups."""

    def load(self, groups: list[dict[str, Any]]) -> None:
        """Called after a checkpoint has been loaded: take it from there."""

    def skip(self, device: torch.device) -> Tensor | None:
        """A float64 `[1]` flag on the device; where it is not 0 after `prepare`, the step does nothing."""
        return None

    def storage(self, group: dict[str, Any], dtype: torch.dtype) -> Storage | None:
        """How weights of this dtype are stored, if not plainly."""
        return None

    def storage_rng_keys(self, seed: int) -> tuple[int, ...]:
        """The integers that writing takes, as many as `storage.rng_keys`."""
        return ()

    def initial(self, name: str, index: int, parameter: Tensor) -> Tensor | None:
        """The first content of a buffer, if not what the buffer says.

        Args:
            name: The buffer.
            index: Place of the parameter in the optimizer.
            parameter: The parameter.
        """
        return None

    def __repr__(self) -> str:
        """As it would be written in code."""
        parameters = inspect.signature(type(self)).parameters
        shown = [
            f"{name}={value!r}"
            for name, parameter in parameters.items()
            if (value := vars(self).get(name, parameter)) is not parameter
            and not (parameter.kind is parameter.KEYWORD_ONLY and value == parameter.default)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


def values(group: dict[str, Any], step: Any, *names: str) -> tuple[Any, ...]:
    """Hyper-parameters of a group for `step_scalars`: as floats, or as they are where the device counts."""
    if isinstance(step, Tensor):
        return tuple(_double(group[name]) for name in names)
    return tuple(float(group[name]) for name in names)


def betas(group: dict[str, Any], step: Any) -> tuple[Any, Any]:
    """The two betas of a group, likewise."""
    first, second = group["betas"]
    return (_double(first), _double(second)) if isinstance(step, Tensor) else (float(first), float(second))


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value
