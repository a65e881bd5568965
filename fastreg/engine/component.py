"""Defines components, the parts that an optimizer is made of.

A component puts a stage into the chain, in a phase, and computes on the host, in double, the numbers that the
stage needs this step.  Where these need a reduction over gradients first, it runs in `prepare` and leaves a
device scalar for the stage to read.
"""

import inspect
from collections.abc import Iterable
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from .plan import Plan
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


class Component:
    """Base of update rules and regularizers.

    Subclasses set `phase`, and `_stage` or override `stage`, and override the other methods they need.
    """

    phase: Phase
    _stage: Stage | None = None
    reads_gradients = False
    """Whether `prepare` or `finish` reads gradients, which have no noise yet: then `DPOptimizer` refuses it.

    True for a class that overrides one of these and does not say False itself.
    """

    def __init_subclass__(cls) -> None:
        """Refuses methods with old names; sets `reads_gradients` of classes with a `prepare` or `finish`."""
        super().__init_subclass__()
        renamed = {"numbers": "step_scalars", "scalars": "device_scalars", "words": "rng_keys"}
        if old := vars(cls).keys() & renamed:
            raise TypeError(f"{cls.__name__} has methods by old names: { ({o: renamed[o] for o in old}) }")
        bases = [base for base in cls.__bases__ if issubclass(base, Component)]
        for name in ("prepare", "finish"):
            inherited = any(getattr(base, name) is getattr(cls, name) for base in bases)
            if not inherited and "reads_gradients" not in vars(cls):
                cls.reads_gradients = True

    @property
    def needs_norm(self) -> bool:
        """Whether `prepare` reads the norm of all gradients from `Plan.measured`."""
        return False

    def stage(self, group: dict[str, Any]) -> Stage | None:
        """Returns the stage for the parameters of a group, which may depend on the options of groups alone.

        The engine calls it when it plans a step, and again after an option changed.
        """
        return self._stage

    def due(self, group: dict[str, Any], step: int) -> bool:
        """Returns whether the stage takes part in a step; its buffers stay unchanged otherwise.

        With `capturable=True` the host does not know the step: the stage always takes part then, and
        `step_scalars` decide what it does.
        """
        return True

    def options(self) -> dict[str, Any]:
        """Returns keys that a group gets from the component unless it has them; they are saved with it."""
        return {}

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """Returns the numbers of the stage, as many as `stage.step_scalars`, at `step`, which counts from 1.

        Where the device counts the steps (`capturable`), `step` is a float64 tensor with an element for each
        parameter; the same arithmetic then gives tensors.
        """
        return ()

    def rng_keys(self, seed: int) -> tuple[int, ...]:
        """Returns the integers of the stage, as many as `stage.rng_keys`, from the optimizer's seed."""
        return ()

    def device_scalars(self, device: torch.device) -> tuple[Tensor, ...]:
        """Returns the device scalars of the stage: the same tensors at every step, written by `prepare`."""
        return ()

    def prepare(self, plan: Plan) -> None:
        """Runs once per step before any parameter changes, with all gradients and how they are sharded."""

    def finish(self, plan: Plan, flags: dict[torch.device, Tensor]) -> None:
        """Runs once per step after the parameters have changed.

        Args:
            plan: The same as in `prepare`.
            flags: For each device that may skip the step, `[1]`: not 0 if it did.
        """

    def save(self, groups: list[dict[str, Any]]) -> None:
        """Writes the state that the component itself holds into the groups, before a checkpoint is made."""

    def load(self, groups: list[dict[str, Any]]) -> None:
        """Reads the state that the component itself holds from the groups, after a checkpoint is loaded."""

    def skip(self, device: torch.device) -> Tensor | None:
        """Returns a `[1]` flag on the device: where it is not 0 after `prepare`, the step does nothing."""
        return None

    def storage(self, group: dict[str, Any], dtype: torch.dtype) -> Storage | None:
        """Returns how weights of this dtype are stored; `None` if as they are."""
        return None

    def storage_rng_keys(self, seed: int) -> tuple[int, ...]:
        """Returns the integers that writing takes, as many as `storage.rng_keys`."""
        return ()

    def initial(self, name: str, index: int, parameter: Tensor) -> Tensor | None:
        """Returns the first content of a buffer of this component; `None` for its default, `Buffer.init`.

        Args:
            name: The buffer.
            index: Index of the parameter in the optimizer.
            parameter: The parameter.
        """
        return None

    def __repr__(self) -> str:
        """Shows the component as it would be written in code."""
        parameters = inspect.signature(type(self)).parameters
        arguments = [
            f"{name}={value!r}"
            for name, parameter in parameters.items()
            if (value := getattr(self, name, parameter)) is not parameter
            and not (parameter.kind is parameter.KEYWORD_ONLY and value == parameter.default)
        ]
        return f"{type(self).__name__}({', '.join(arguments)})"


def staged_components(
    components: Iterable[Component], group: dict[str, Any], device: torch.device, step: Any
) -> list[Component]:
    """Returns the components that have a stage for a group, when a step is planned.

    Raises:
        TypeError: If one returns more or fewer numbers than its stage declares.
    """
    staged = [(component, stage) for component in components if (stage := component.stage(group)) is not None]
    for component, stage in staged:
        for name, numbers, declared in (
            ("step_scalars", component.step_scalars(group, step), stage.step_scalars),
            ("rng_keys", component.rng_keys(0), len(stage.rng_keys)),
            ("device_scalars", component.device_scalars(device), len(stage.device_scalars)),
        ):
            if len(numbers) != declared:
                raise TypeError(
                    f"{type(component).__name__}.{name} returned {len(numbers)} numbers, "
                    f"its stage declares {name}={declared}"
                )
    return [component for component, _ in staged]
