"""Callbacks for any Trainer: rates that change with the step, and noise on the embeddings."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from ..nn import EmbeddingNoise, attach_embedding_noise
from ..recipe.model_callbacks import Noise


class ScheduleCallback(TrainerCallback):
    """Steps schedulers of rates: before each training step, to the number of steps that were taken.

    A resumed run needs only that number, which Trainer saves.

    ```python
    annealed = fastreg.layerwise.DropoutScheduler(model, fastreg.schedules.Linear(0.1, steps=1000))
    Trainer(model, args, callbacks=[ScheduleCallback(annealed)])
    ```

    Args:
        schedulers: Objects with a `step(n)` that is a function of n, such as `layerwise.DropoutScheduler`.

    Raises:
        TypeError: If one has no `step`.
    """

    def __init__(self, *schedulers: Any) -> None:
        for scheduler in schedulers:
            if not callable(getattr(scheduler, "step", None)):
                raise TypeError(f"schedulers must have step(n), as DropoutScheduler does, got {scheduler!r}")
        self.schedulers = schedulers

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets the rates of this step."""
        for scheduler in self.schedulers:
            scheduler.step(state.global_step)


def check_noise(source: str, args: Any) -> None:
    """Raises `ValueError` if the Trainer's arguments add noise to embeddings, as `source` does already."""
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            f"embeddings would get noise twice: by {source} and by neftune_noise_alpha="
            f"{args.neftune_noise_alpha} of TrainingArguments; leave one out"
        )


class EmbeddingNoiseCallback(TrainerCallback):
    """Noise on the embeddings of tokens while training (NEFTune), with padded or true lengths.

    With the defaults, training is that of `neftune_noise_alpha=5` in `TrainingArguments`, bit for bit.

    Args:
        alpha: Size of the noise, see `fastreg.nn.EmbeddingNoise`.
        std: Standard deviation of Gaussian noise instead.
        length: `"padded"` or `"true"`.
        factor: Factor of the size, as a function of the number of steps taken, see `fastreg.schedules`.

    Raises:
        ValueError: For values out of range; in training, if `neftune_noise_alpha` adds noise as well.
    """

    def __init__(
        self, alpha: float = 5.0, *, std: float | None = None, length: str = "padded",
        factor: Callable[[int], float] | None = None,
    ) -> None:  # fmt: skip
        EmbeddingNoise(alpha, std=std, length=length)  # refuses values out of range
        self._options: dict[str, Any] = {"alpha": alpha, "std": std, "length": length}
        self._factor = factor
        self._noise: Noise | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attaches the noise to the model."""
        check_noise("this callback", args)
        self.on_train_end(args, state, control)  # after a run that was interrupted
        attached = attach_embedding_noise(kwargs["model"], **self._options)
        self._noise = Noise("embedding_noise", attached, self._factor)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets the size of the noise."""
        if self._noise is not None:
            self._noise.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the noise away again."""
        if self._noise is not None:
            self._noise.remove()
        self._noise = None
