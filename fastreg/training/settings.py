"""The settings that all training loops share."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..common.validation import check_choice, check_int, check_known
from .batches import Loss
from .history import History

S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """Settings of training loops, given to them as keyword arguments.

    Args:
        epochs: How many times to go through the data; `None`: until `max_steps`.
        max_steps: Optimizer steps after which to stop, even before the epochs are over.
        device: Where to train; by default where the model is.
        amp: `"bf16"` or `"fp16"` for mixed precision, the latter with a `GradScaler`.
        accumulate: Batches for each step; gradients are means over them, also over fewer at the end.
        schedule: Factor of all learning rates as a function of the step, such as those of
            `fastreg.schedules`.
        warmup: Steps over which the factor rises from 0 in equal steps, on top of the schedule.
        loss_fn: `loss_fn(outputs, labels)`. By default the loss of a mapping is the model's own, and that of
            (inputs, labels) the cross-entropy. A tensor is its own label.
        compute_loss: `compute_loss(model, batch)`, such as `lambda *args: fastreg.r_drop(*args).loss`,
            for batches of any kind.
        validation: Batches to validate with after each epoch, with the averages of the weights if there are
            any.
        callback: Called with the history after every step; training ends when it returns `True`.
        history: The history of a training of the same model to continue, with all its counts and its
            optimizer, which keeps its learning rate, decay and regularizers.
        progress: Whether to show a bar, if tqdm is installed.

    Raises:
        TypeError: For settings that should be functions and are not.
        ValueError: For values out of range.
    """

    epochs: int | None = 1
    max_steps: int | None = None
    device: torch.device | str | int | None = None
    amp: Literal["bf16", "fp16"] | None = None
    accumulate: int = 1
    schedule: Callable[[int], float] | None = None
    warmup: int = 0
    loss_fn: Loss | None = None
    compute_loss: Callable[[nn.Module, Any], Tensor] | None = None
    validation: Iterable[Any] | None = None
    callback: Callable[[History], Any] | None = None
    history: History | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name, lowest in (("epochs", 1), ("max_steps", 1), ("accumulate", 1), ("warmup", 0)):
            value = getattr(self, name)
            if value is not None or name in ("accumulate", "warmup"):
                object.__setattr__(self, name, check_int(name, value, lowest))
        for name in ("schedule", "loss_fn", "compute_loss", "callback"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be a function, got {name}={value!r}")
        if self.epochs is None and self.max_steps is None:
            raise ValueError("give epochs= or max_steps=, got None for both")
        check_choice("amp", self.amp, (None, "bf16", "fp16"))
        if self.loss_fn is not None and self.compute_loss is not None:
            raise ValueError("give loss_fn= or compute_loss=, not both")

    @classmethod
    def from_options(cls: type[S], options: Mapping[str, Any]) -> S:
        """Returns settings made of keyword arguments; raises `TypeError` for an unknown name."""
        check_known("there is no setting", options, [field.name for field in fields(cls)], TypeError)
        return cls(**options)

    @property
    def done(self) -> int:
        """The number of steps in the history to continue; 0 without one."""
        return 0 if self.history is None else self.history.steps

    def steps(self, dataloader: Any) -> int | None:
        """Returns the number of optimizer steps to take; `None` if the data has no length."""
        try:
            whole = None if self.epochs is None else self.epochs * -(-len(dataloader) // self.accumulate)
        except TypeError:  # no length
            return self.max_steps if self.epochs is None else None
        return min(n for n in (whole, self.max_steps) if n is not None)
