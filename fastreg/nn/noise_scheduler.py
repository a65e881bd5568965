"""Levels of noise that change in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from .noise import TokenNoise, _NoiseBase

LEVEL_NAMES = ("std", "alpha", "rate")
"""What a level is called."""


class NoiseScheduler:
    """Sets levels of noise as their own values times a function of the training step.

    ```python
    noise = fastreg.nn.attach_embedding_noise(model, alpha=5.0)
    scheduler = NoiseScheduler(noise, fastreg.schedules.Linear(1.0, steps=10_000))  # down to none
    for batch in data:
        ...
        optimizer.step()
        scheduler.step()
    ```

    Step 0 is set at once.  A level depends on the step and on nothing else; it is held in a tensor, so that
    compiled code goes on as it is.

    Args:
        targets: What has a `std`, an `alpha` or a `rate` (modules of noise, what attaching them returns,
            `fastreg.WeightNoise`), or a model with modules of noise in it; or several of these.
        factor: A function of the step, see `fastreg.schedules`, whose value is >= 0: its rates are shares.

    Attributes:
        last_step: The step whose levels are set.

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
        self._knobs = [knob for target in (targets if several else [targets]) for knob in _knobs(target)]
        self.bases = [float(_get(*knob)) for knob in self._knobs]
        self.last_step = 0
        self.step(0)

    def step(self, step: int | None = None) -> None:
        """Sets the levels of the next step, or of a given one.

        Args:
            step: The step, >= 0.

        Raises:
            ValueError: If the factor is negative or not finite.
        """
        step = self.last_step + 1 if step is None else step
        factor = self.factor(step)
        if not 0 <= factor < math.inf:
            raise ValueError(f"factor at step {step} must be finite and >= 0, got {factor!r}")
        for (_, name), base in zip(self._knobs, self.bases, strict=True):
            if name == "rate" and base * factor > 1:
                raise ValueError(f"rate at step {step} must be in [0, 1], got {base} * {factor!r}")
        for knob, base in zip(self._knobs, self.bases, strict=True):
            _set(*knob, base * factor)
        self.last_step = step

    def get_last_level(self) -> list[float]:
        """The levels that are set, in the order of the targets."""
        return [_get(*knob) for knob in self._knobs]

    def state_dict(self) -> dict[str, Any]:
        """The step, and the levels that are multiplied; the schedule is an argument."""
        return {"last_step": self.last_step, "bases": list(self.bases)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Sets the levels of the step that was saved.

        Raises:
            ValueError: If there were more or fewer targets.
        """
        bases = [float(base) for base in state_dict["bases"]]
        if len(bases) != len(self.bases):
            raise ValueError(f"the checkpoint has {len(bases)} levels, the scheduler {len(self.bases)}")
        self.bases = bases
        self.step(state_dict["last_step"])


def _knobs(target: Any) -> list[tuple[Any, str]]:
    """Holders of levels and their names: attributes, or keys of parameter groups."""
    if isinstance(getattr(target, "param_groups", None), list):
        groups = [(group, "std") for group in target.param_groups if "std" in group]
        if groups:
            return groups
    if isinstance(target, nn.Module):  # before its own: a model may well have an `alpha` that is no noise
        held = [m for m in target.modules() if m is not target and isinstance(m, (_NoiseBase, TokenNoise))]
        if held:
            return [knob for module in held for knob in _knobs(module)]
    own = [(target, name) for name in LEVEL_NAMES if isinstance(getattr(target, name, None), (int, float))]
    if own:
        return own
    raise TypeError(
        f"{type(target).__name__} has no level of noise: give modules of noise, what attach_..._noise() "
        "returns, or a WeightNoise"
    )


def _get(holder: Any, name: str) -> float:
    return holder[name] if isinstance(holder, dict) else getattr(holder, name)


def _set(holder: Any, name: str, value: float) -> None:
    if isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, value)
