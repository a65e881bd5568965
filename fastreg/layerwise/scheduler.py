"""Changes the dropout rates of a model in the course of training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..common.unwrap import unwrap_model
from ..common.validation import check_int, check_rate
from ..schedules import Constant, LayerRates, Schedule
from .audit import audit
from .set_rates import Rates, by_role, choose, rate_of
from .sites import DropoutSite
from .write_rates import write

Times = float | Callable[[int], float]
"""A rate, or a function of the step, see `fastreg.schedules`."""


class DropoutScheduler:
    """Sets the dropout rates of a model as functions of the training step.

    ```python
    scheduler = DropoutScheduler(model, Linear(0.3, end=0.0, steps=10_000))  # the same for all layers
    scheduler = DropoutScheduler(model, Linear(1.0, steps=10_000), layers=LinearLayers(0.1, 0.02))
    for batch in data:
        ...
        optimizer.step()
        scheduler.step()
    ```

    The constructor sets the rate of step 0.  With `layers`, the rate is a factor over time times a rate over
    layers.  Rates depend only on the step, which is all that a resumed run needs.

    Rates of modules change without recompilation.  Rates that a model passes to functions are Python floats,
    constants for `torch.compile`: those of attention probabilities, and all of BART, OPT and Whisper (`float`
    in `table`).  For these the schedule is rounded to at most 7 levels from its lowest to its highest rate,
    since torch compiles at most 8 variants.

    Arguments are those of `set_dropout`, and:
        schedule: A function of the step, see `fastreg.schedules`; or a dict of these by role.
        layers: Rates over layers, as `set_dropout` takes them; the schedule is then a factor in [0, 1].
        levels: The number of levels for rates that are Python floats, at least 2; `None` for no rounding.

    Attributes:
        last_step: The step whose rates are set.
        table: The present rates, with path, role, layer and how.

    Raises:
        ValueError: For values out of range, a missing role, and a function without known bounds where levels
            are needed.
    """

    def __init__(
        self, model: nn.Module, schedule: Times | Mapping[str, Times],
        roles: str | Sequence[str] = ("hidden",), *, layers: Rates | None = None, inject: bool = False,
        stacks: str | Sequence[str] | None = None, levels: int | None = 7, inputs: Any = None,
    ) -> None:  # fmt: skip
        self.model = unwrap_model(model)
        self.levels = None if levels is None else check_int("levels", levels, 2)
        self.schedules: dict[str, Callable[[int], float]] = {
            role: times if callable(times) else Constant(times)
            for role, times in by_role(schedule, roles).items()
        }
        wanted = tuple(self.schedules)
        self.layers: dict[str, LayerRates] | None = None if layers is None else by_role(layers, wanted)
        if self.layers is not None and set(self.layers) != set(wanted):
            raise ValueError(f"layers has rates for {tuple(self.layers)}, the schedule for {wanted}")
        self._sites = choose(self.model, audit(self.model, inputs), wanted, inject, stacks)
        rates = self._rates(0)
        self.last_step = 0
        self.table = write(self.model, self._sites, rates)

    def step(self, step: int | None = None) -> None:
        """Sets the rates of the next step, or of another one.

        Args:
            step: The step, >= 0.

        Raises:
            ValueError: If the step is no whole number, or a rate is not in [0, 1].
        """
        step = self.last_step + 1 if step is None else check_int("step", step, 0)
        rates = self._rates(step)
        changed = [site for site in self._sites if site.rate != rates[site.path]]
        if changed:
            write(self.model, changed, rates)
            self.table = self.table.at(rates)
        self.last_step = step

    def get_last_rate(self) -> dict[str, float]:
        """Returns the present rates by path."""
        return self.table.rates

    def state_dict(self) -> dict[str, Any]:
        """Returns the step; schedules are not saved."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Sets the rates of the saved step."""
        self.step(state_dict["last_step"])

    def _rates(self, step: int) -> dict[str, float]:
        rates = {}
        for site in self._sites:
            schedule = self.schedules[site.role]
            rate = check_rate(f"rate at step {step}", schedule(step))
            if site.is_number and self.levels is not None:
                rate = _rounded(rate, schedule, self.levels, site)
            rates[site.path] = rate if self.layers is None else rate * rate_of(self.layers[site.role], site)
        return rates


def _rounded(rate: float, schedule: Callable[[int], float], levels: int, site: DropoutSite) -> float:
    """Returns the nearest of some equidistant levels between the bounds of the schedule."""
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"the rate of {site.path} is a Python float, and torch.compile would compile each of its values: "
            f"give a schedule of fastreg.schedules, whose bounds are known, or levels=None; got {schedule!r}"
        )
    low, high = schedule.bounds
    share = round((rate - low) / (high - low) * (levels - 1)) / (levels - 1) if high > low else 0.0
    return low * (1 - share) + high * share
