"""Schedules levels of noise in the course of training."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from ..common.validation import check_int
from .noise import TokenNoise, _NoiseBase

LEVEL_NAMES = ("std", "alpha", "rate")
"""Names of the attributes that are levels of noise."""


class NoiseScheduler:
    """Multiplies levels of noise by a function of the training step.

    ```python
    noise = fastreg.nn.attach_embedding_noise(model, alpha=5.0)
    scheduler = NoiseScheduler(noise, fastreg.schedules.Linear(1.0, steps=10_000))  # down to none
    for batch in data:
        ...
        optimizer.step()
        scheduler.step()
    ```

    Levels of step 0 are set at once.  A level depends on the step alone; it is a tensor, so that compiled
    code need not be compiled again.

    Args:
        targets: One or several objects with a `std`, an `alpha` or a `rate`: modules of noise, attached
            noise, `fastreg.WeightNoise`, or models that contain modules of noise.
        factor: A function of the step, see `fastreg.schedules`, whose value is >= 0.

    Attributes:
        last_step: The step of the current levels.

    Raises:
        TypeError: If a target has no level of noise.
        ValueError: If a factor is negative or not finite.
    """

    def __init__(self, targets: Any, factor: Callable[[int], float]) -> None:
        if not callable(factor):
            raise TypeError(
                f"factor must be a function of the step, such as fastreg.schedules.Linear(1.0, steps=1000), "
                f"got {factor!r}"
            )
        several = isinstance(targets, Iterable) and not isinstance(targets, nn.Module)
        self.factor = factor
        self._levels = [level for target in (targets if several else [targets]) for level in _levels(target)]
        self.bases = [float(_get(*level)) for level in self._levels]
        self.last_step = 0
        self.step(0)

    def step(self, step: int | None = None) -> None:
        """Sets the levels of the next step, or of another one.

        Args:
            step: The step, >= 0.

        Raises:
            ValueError: If the step is no whole number, or the factor is negative or not finite.
        """
        step = self.last_step + 1 if step is None else check_int("step", step, 0)
        factor = self.factor(step)
        if not 0 <= factor < math.inf:
            raise ValueError(f"factor at step {step} must be finite and >= 0, got {factor!r}")
        for (_, name), base in zip(self._levels, self.bases, strict=True):
            if name == "rate" and base * factor > 1:
                raise ValueError(f"rate at step {step} must be in [0, 1], got {base} * {factor!r}")
        for level, base in zip(self._levels, self.bases, strict=True):
            _set(*level, base * factor)
        self.last_step = step

    def get_last_level(self) -> list[float]:
        """Returns the current levels, in the order of the targets."""
        return [_get(*level) for level in self._levels]

    def state_dict(self) -> dict[str, Any]:
        """Returns the step and the levels before multiplication, but not the schedule."""
        return {"last_step": self.last_step, "bases": list(self.bases)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the levels of the saved step.

        Raises:
            ValueError: If the number of targets differs.
        """
        bases = [float(base) for base in state_dict["bases"]]
        if len(bases) != len(self.bases):
            raise ValueError(f"the checkpoint has {len(bases)} levels, the scheduler {len(self.bases)}")
        self.bases = bases
        self.step(state_dict["last_step"])


def _levels(target: Any) -> list[tuple[Any, str]]:
    """Returns holders of levels with the name of an attribute, or of a key of a parameter group."""
    if isinstance(getattr(target, "param_groups", None), list):
        groups = [(group, "std") for group in target.param_groups if "std" in group]
        if groups:
            return groups
    if isinstance(target, nn.Module):  # first: an `alpha` of a model need not be noise
        inside = [m for m in target.modules() if m is not target and isinstance(m, (_NoiseBase, TokenNoise))]
        if inside:
            return [level for module in inside for level in _levels(module)]
    levels = [(target, name) for name in LEVEL_NAMES if isinstance(getattr(target, name, None), (int, float))]
    if levels:
        return levels
    raise TypeError(
        f"{type(target).__name__} has no level of noise: give modules of noise, the result of "
        "attach_..._noise(), or a WeightNoise"
    )


def _get(holder: Any, name: str) -> float:
    return holder[name] if isinstance(holder, dict) else getattr(holder, name)


def _set(holder: Any, name: str, value: float) -> None:
    if isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, value)
