"""Defines rates as functions of the training step and of the layer.

Schedules have no state: a resumed run gets the same rates.  All are frozen, comparable and picklable, and
raise a `ValueError` for values out of range.

| function of the step | rate                                             |
|----------------------|--------------------------------------------------|
| `Constant`           | the same at all steps                            |
| `Linear`             | from start to end in equal steps                 |
| `Cosine`             | from start to end along half a cosine            |
| `Early`, `Late`      | only before, only after a step                   |
| `Piecewise`          | through given points, in steps or in lines       |

| function of the layer | rate                                            |
|-----------------------|-------------------------------------------------|
| `LinearLayers`        | base + layer · increase                         |
| `DropPathLayers`      | from 0 to a rate in equal steps, as timm has it |
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .common.validation import check_choice, check_int, check_range, check_rate

LayerRates = float | Sequence[float] | Callable[..., float]
"""A rate for all layers, one for each, or a function of (layer, number of layers) or of the layer."""


_RATES = ("rate", "start", "end")


@dataclass(frozen=True)
class Schedule:
    """Base of the rates that are functions of the step, `schedule(step)`."""

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            if name in _RATES:
                object.__setattr__(self, name, check_rate(name, value))
            elif name in ("steps", "cutoff"):
                object.__setattr__(self, name, check_int(name, value))
            elif name == "kind":
                check_choice(name, value, ("constant", "linear"))

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest rate of all steps."""
        rates = [value for name, value in vars(self).items() if name in _RATES]
        rates += [0.0] * hasattr(self, "cutoff")
        return min(rates), max(rates)

    def __call__(self, step: int) -> float:
        """Returns the rate at a step; step 0 is the first.

        Raises:
            ValueError: If the step is negative or no whole number.
        """
        return self._rate(check_int("step", step, 0))

    def _rate(self, step: int) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Schedule):
    """The same rate at all steps.

    Args:
        rate: In [0, 1].
    """

    rate: float

    def _rate(self, step: int) -> float:
        return self.rate


@dataclass(frozen=True)
class _Ramp(Schedule):
    start: float
    end: float = 0.0
    steps: int = None  # type: ignore[assignment]  # has no default, but follows `end`, which has one

    def __post_init__(self) -> None:
        if self.steps is None:
            raise ValueError(f"{type(self).__name__} needs steps=, the step from which the rate is `end`")
        super().__post_init__()

    def _rate(self, step: int) -> float:
        if step >= self.steps:
            return self.end
        # Written so that the start is met exactly, and with an end of 0 it is start · (1 - t/T).
        share = self._share(step / self.steps)
        return self.start * (1 - share) + self.end * share

    def _share(self, time: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(_Ramp):
    """A rate from `start` to `end` in equal steps: start · (1 - t/T) + end · t/T, and `end` from step T on.

    With the default end this is annealed dropout, start · (1 - t/T).

    Args:
        start: Rate at step 0, in [0, 1].
        end: Rate from step `steps` on, in [0, 1].
        steps: T >= 1; must be given.

    Reference:
        Rennie et al. 2014, "Annealed dropout training of deep networks".
    """

    def _share(self, time: float) -> float:
        return time


@dataclass(frozen=True)
class Cosine(_Ramp):
    """A rate along half a cosine: end + (start - end) · (1 + cos(π t/T)) / 2.

    Arguments are those of `Linear`.

    Reference:
        Loshchilov & Hutter 2017, "SGDR", for the shape; Morerio et al. 2017, "Curriculum dropout", for rates
        that change in training.
    """

    def _share(self, time: float) -> float:
        return (1 - math.cos(math.pi * time)) / 2


@dataclass(frozen=True)
class Early(Schedule):
    """Dropout only before a step, for models that underfit: it makes early gradients agree more.

    Args:
        rate: In [0, 1].
        cutoff: The first step without dropout, > 0.
        kind: `"constant"`, or `"linear"`: down to 0 at the last step before the cutoff.

    Reference:
        Liu et al. 2023, "Dropout reduces underfitting".
    """

    rate: float
    cutoff: int
    kind: str = "constant"

    def _rate(self, step: int) -> float:
        if step >= self.cutoff:
            return 0.0
        if self.kind == "constant" or self.cutoff == 1:
            return self.rate
        return self.rate * (1 - step / (self.cutoff - 1))


@dataclass(frozen=True)
class Late(Schedule):
    """Dropout only from a step on, for models that overfit.

    Args:
        rate: In [0, 1].
        cutoff: The first step with dropout, > 0.

    Reference:
        Liu et al. 2023, "Dropout reduces underfitting".
    """

    rate: float
    cutoff: int

    def _rate(self, step: int) -> float:
        return self.rate if step >= self.cutoff else 0.0


@dataclass(frozen=True)
class Piecewise(Schedule):
    """A rate through several points: `Piecewise(((0, 0.0), (100, 0.3), (1000, 0.1)))`.

    Before the first point and after the last the rate stays.

    Args:
        points: (step, rate) with growing steps >= 0 and rates in [0, 1].
        kind: `"constant"`: each rate holds until the next point; or `"linear"`: in lines between them.
    """

    points: tuple[tuple[int, float], ...]
    kind: str = "constant"

    def __post_init__(self) -> None:
        points = tuple(
            (check_int("step of a point", step, 0), check_rate(f"rate at step {step}", rate))
            for step, rate in self.points
        )
        object.__setattr__(self, "points", points)
        super().__post_init__()
        steps = [step for step, _ in points]
        if not steps or any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"points must be (step, rate) with growing steps >= 0, got {points}")

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest of the points."""
        rates = [rate for _, rate in self.points]
        return min(rates), max(rates)

    def _rate(self, step: int) -> float:
        if step < self.points[0][0]:
            return self.points[0][1]
        i = max(i for i, (at, _) in enumerate(self.points) if at <= step)
        (at, rate), after = self.points[i], self.points[i + 1 : i + 2]
        if self.kind == "constant" or not after:
            return rate
        share = (step - at) / (after[0][0] - at)
        return rate * (1 - share) + after[0][1] * share


@dataclass(frozen=True)
class LinearLayers:
    """A rate that changes linearly with the layer: base + layer · increase; layer 0 is the first.

    Args:
        base: Rate of the first layer, in [0, 1].
        increase: Added by each layer; may be negative.

    Raises:
        ValueError: If a rate is not in [0, 1]: the base at once, the others where the number of layers is
            known.
    """

    base: float
    increase: float = 0.0

    def __post_init__(self) -> None:
        check_rate("base", self.base)
        check_range("increase", self.increase, -1, 1)

    def __call__(self, layer: int, layers: int) -> float:
        """Returns the rate of a layer."""
        rate = self.base + layer * self.increase
        last = self.base + (layers - 1) * self.increase
        if not 0 <= last <= 1:
            raise ValueError(
                f"rates must be in [0, 1], but base={self.base} and increase={self.increase} give {last:g} "
                f"at layer {layers - 1}; with {layers} layers use an increase between "
                f"{-self.base / max(layers - 1, 1):g} and {(1 - self.base) / max(layers - 1, 1):g}"
            )
        return rate


@dataclass(frozen=True)
class DropPathLayers:
    """Rates from 0 at the first layer to `rate` at the last, as in timm: rate · layer / (layers - 1).

    Args:
        rate: Of the last layer, in [0, 1].

    Reference:
        Huang et al. 2016, "Deep networks with stochastic depth".
    """

    rate: float

    def __post_init__(self) -> None:
        check_rate("rate", self.rate)

    def __call__(self, layer: int, layers: int) -> float:
        """Returns the rate of a layer."""
        return self.rate * layer / (layers - 1) if layers > 1 else 0.0


def layer_rate(rates: LayerRates, layer: int, layers: int) -> float:
    """Returns the rate of a layer.

    Args:
        rates: See `LayerRates`.
        layer: 0 for the first.
        layers: The number of layers.

    Raises:
        TypeError: For a function of the step.
        ValueError: If the rate is not in [0, 1], or there are not as many rates as layers.
    """
    if isinstance(rates, Schedule):
        raise TypeError(f"{rates} is a function of the step, not of the layer: give it to DropoutScheduler")
    rate: Any
    if callable(rates):
        rate = rates(layer) if _takes_one(rates) else rates(layer, layers)
    elif isinstance(rates, Sequence) and not isinstance(rates, str):
        if len(rates) != layers:
            raise ValueError(f"got {len(rates)} rates for {layers} layers: give one for each")
        rate = rates[layer]
    else:
        rate = rates
    by_layer = callable(rates) or isinstance(rates, Sequence)
    return check_rate(f"rate of layer {layer}" if by_layer else "rate", rate)


def _takes_one(function: Callable[..., float]) -> bool:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    needed = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return len(needed) == 1 and all(p.kind in positional for p in parameters)
