"""The history of a training: losses, rates, counts and times."""

import math
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class History:
    """The record of a training loop so far; an interruption leaves it as it is.

    Args:
        losses: The loss of each optimizer step, the mean over its batches.
        lr: The highest learning rate of all groups at each step.
        grad_norm: The gradient norm of each step before clipping; empty without `ClipNorm`.
        epochs: The mean loss of each epoch, the last of which may be shorter.
        validation: The mean loss on the validation data after each epoch.
        samples: The number of samples that were trained on.
        tokens: The number of tokens without padding, in batches with `input_ids`.
        seconds: The time that training took, validation included.
        interrupted: Whether a KeyboardInterrupt ended the training.
        model: The model.
        optimizer: The optimizer, with its averages if it has any.
        scaler: The `GradScaler` of `amp="fp16"`.
    """

    losses: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    epochs: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    model: Any = field(default=None, repr=False)
    optimizer: Any = field(default=None, repr=False)
    scaler: Any = field(default=None, repr=False)

    @property
    def steps(self) -> int:
        """The number of optimizer steps so far."""
        return len(self.losses)

    @property
    def samples_per_second(self) -> float:
        """The speed in samples; NaN before the first step."""
        return self.samples / self.seconds if self.seconds else math.nan

    @property
    def tokens_per_second(self) -> float:
        """The speed in tokens; NaN before the first step."""
        return self.tokens / self.seconds if self.seconds else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers and lists of numbers, such as for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        plain = {name: list(value) if isinstance(value, list) else value for name, value in values.items()}
        rates = {name: getattr(self, name) for name in ("samples_per_second", "tokens_per_second")}
        return {"steps": self.steps, **plain, **rates}


class DivergedError(FloatingPointError):
    """A loss that is NaN or infinite; weights are those before the step, and `history` ends before it."""

    def __init__(self, loss: float, history: History) -> None:
        super().__init__(
            f"the loss is {loss} at step {history.steps}, which was not taken: lower lr, clip gradients, or "
            "look for NaN in the data"
        )
        self.history = history
