"""Callbacks for any Trainer: what changes with the step, and noise on the embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class ScheduleCallback(TrainerCallback):
    """Steps schedulers of rates: before each training step, to the number of steps that were taken.

    Whoever resumes needs nothing but that number, which Trainer keeps.

    ```python
    annealed = fastreg.layerwise.DropoutScheduler(model, fastreg.schedules.Linear(0.1, steps=1000))
    Trainer(model, args, callbacks=[ScheduleCallback(annealed)])
    ```

    Args:
        schedulers: Whatever has a `step(n)` that is a function of n, such as `layerwise.DropoutScheduler`.

    Raises:
        TypeError: If one has no `step`.
    """

    def __init__(self, *schedulers: Any) -> None:
        for scheduler in schedulers:
            if not callable(getattr(scheduler, "step", None)):
                raise TypeError(f"schedulers must have step(n), as DropoutScheduler does, got {scheduler!r}")
        self.schedulers = schedulers

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the rates of this step."""
        for scheduler in self.schedulers:
            scheduler.step(state.global_step)
