"""Swaps averages into the parameters of an optimizer, to evaluate with them, and out again.

While an average is swapped in, parameters hold it and `ACTIVE` in every group is its name.  The weight that
is trained is kept under `TRAINED` in the state meanwhile: in the memory of the average where both have one
dtype, in a copy where parameters are narrower.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..engine import layout
from ..engine.multi_tensor_optimizer import MultiTensorOptimizer
from .slow_weights import SlowWeights
from .weight_averages import Average

ACTIVE = "averaged"
TRAINED = "trained_weight"


class AveragingOptimizer(MultiTensorOptimizer):
    """Base of optimizers whose averages can be swapped into the parameters."""

    def reset_cache(self) -> None:
        """Forgets all that is kept between steps; call it after replacing state or groups."""
        super().reset_cache()
        self._inside = False

    @contextlib.contextmanager
    def averaged(self, name: str | None = None) -> Iterator[None]:
        """Swaps averages in within a block; afterwards, parameters hold what they held before.

        Parameters that have not been stepped yet stay as they are.

        Args:
            name: Which average, if there are several; the first by default.

        Raises:
            ValueError: If there is no such average.
            RuntimeError: If averages are swapped in already, as after `eval()`.
        """
        if self.active_average is not None:
            raise RuntimeError("averages are swapped in already")
        average = self._average(name)
        self._inside = True
        try:
            self._swap_in(average)
            yield
        finally:
            self._swap_out()
            self._inside = False

    def eval(self) -> None:
        """Swaps the first average among the regularizers in until `train()`.

        Nothing happens without one, and where it is swapped in already.  Checkpoints may be saved in between:
        with those of the model, which holds the averages, training resumes exactly after `train()`.
        """
        if self.active_average is None and self._averages():
            self._settle()
            self._swap_in(self._average(None))

    def train(self) -> None:
        """Lets parameters hold what is trained, as before `eval()`.

        Raises:
            RuntimeError: Inside `averaged()`.
        """
        if self.active_average is not None:
            self._refuse_inside("train()", "end it early")
            self._swap_out()

    @property
    def active_average(self) -> str | None:
        """The name of the average that parameters hold now; `None` if they hold what is trained."""
        return self.param_groups[0].get(ACTIVE) if self.param_groups else None

    def _settle(self) -> None:
        """Waits until step counts are right."""

    def _refuse_inside(self, call: str, consequence: str) -> None:
        if self._inside:
            raise RuntimeError(f"{call} inside `with optimizer.averaged():` would {consequence}")

    def _averages(self) -> dict[str, Average]:
        """Returns the averages by name: first those of the weights, then slow, then computed ones."""
        averages = [component for component in self.components if isinstance(component, Average)]
        averages.sort(key=lambda component: (component.computed, isinstance(component, SlowWeights)))
        return {component.name: component for component in averages}

    def _average(self, name: str | None) -> Average:
        """Returns the average of this name, or the first; `ValueError` if there is none."""
        averages = self._averages()
        if not averages:
            raise ValueError("averaged() needs an average: pass regularizers=[fastreg.EMA(0.999)]")
        if name is not None and name not in averages:
            raise ValueError(f"no average is called {name!r}, only {', '.join(map(repr, averages))}")
        return averages[next(iter(averages)) if name is None else name]

    @torch.no_grad()
    def _swap_in(self, average: Average) -> None:
        """Lets parameters hold an average, where there is one yet."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p, {})
                exists = average.computed or average.name in state
                if exists and average.begun(int(state.get("step", 0))):
                    _exchange(p, state, average)
            group[ACTIVE] = average.name
        layout.reshard(p for group in self.param_groups for p in group["params"])
        average.module_buffers.swap_in()

    @torch.no_grad()
    def _swap_out(self) -> None:
        """Lets parameters hold again what is trained."""
        if (name := self.active_average) is not None:
            self._average(name).module_buffers.swap_out()
        for group in self.param_groups:
            name = group.pop(ACTIVE, None)
            for p in group["params"]:
                state = self.state.get(p, {})
                if TRAINED not in state:
                    continue
                trained, average = state.pop(TRAINED), state.get(name)
                if average is not None and average.data_ptr() == p.data_ptr():
                    weight = trained.clone()
                    state[name] = trained.copy_(average)
                    trained = weight
                p.copy_(trained)
        layout.reshard(p for group in self.param_groups for p in group["params"])


def _exchange(p: Tensor, state: dict[str, Any], average: Average) -> None:
    weight, trained = average.value(p, state), p.detach().clone()
    p.copy_(weight)
    if not average.computed and weight.dtype == p.dtype:
        # The average is in the parameter now: its memory keeps the weight.
        trained, state[average.name] = weight.copy_(trained), p.detach()
    state[TRAINED] = trained
