"""Applies a recipe in a Trainer: `TrainingArguments` complete it, and must not contradict it."""

import dataclasses
import os
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from ..losses.r_drop import r_drop
from ..recipe import Regularization
from ..recipe.build import make_callbacks, make_groups, make_optimizer
from ..recipe.callbacks import Callbacks, Passes
from .callbacks import check_noise

SAVED = "fastreg.pt"
"""The file of a checkpoint that holds the state of callbacks."""

OPTIMIZER_ARGUMENTS = ("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")


def check(args: Any) -> None:
    """Refuses arguments for an optimizer, which the recipe replaces, that differ from their defaults."""
    for name in OPTIMIZER_ARGUMENTS:
        field = TrainingArguments.__dataclass_fields__[name]
        has_factory = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if has_factory else field.default
        if (value := getattr(args, name)) != default:
            raise ValueError(
                f"the recipe makes the optimizer, and TrainingArguments has {name}={value!r}: say it "
                "in the recipe (weight_decay=..., optimizer={'betas': ...}) and leave the argument out"
            )


class AppliedRecipe:
    """Applies a recipe, undoes it at the end of training, and applies it again for more training.

    Two things are not among the callbacks, since Trainer does them differently: SAM's second pass, which is
    made for all micro-batches of a step together, and R-Drop, whose loss is scaled with that of the model.
    Learning rate, seed and number of steps are those of the Trainer's arguments, which must not contradict
    the recipe.
    """

    def __init__(self, recipe: Regularization, trainer: Any) -> None:
        check(trainer.args)
        if recipe.embedding_noise is not None:
            check_noise("embedding_noise of the recipe", trainer.args)
        if trainer.is_fsdp_enabled:
            for name in ("weight_noise", "adversarial"):
                if vars(recipe)[name] is not None:
                    raise ValueError(
                        f"{name} holds the parameters of the model, which FSDP replaces: leave it out, or "
                        "train with DistributedDataParallel"
                    )
        self.r_drop_alpha: float | None = None
        if recipe.r_drop is not None:
            if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
                raise ValueError(
                    "r_drop takes the loss that the model computes from its labels: leave out "
                    "label_smoothing_factor and compute_loss_func"
                )
            self.r_drop_alpha = recipe.r_drop.get("alpha", 1.0)  # type: ignore[union-attr]
        self._recipe, self._args = dataclasses.replace(recipe, r_drop=None), trainer.args
        self.callbacks = Callbacks()
        self.passes: list[Passes] = []
        self._fresh = False

    def optimizer(self, model: nn.Module, steps: int | None) -> Any:
        """Returns the optimizer for a run of so many steps, and applies the recipe to the model."""
        self.remove()
        lr, seed = self._args.learning_rate, self._args.seed
        optimizer = make_optimizer(self._recipe, make_groups(self._recipe, model, lr), lr, steps, seed)
        self.reapply(model, steps)
        return optimizer

    def reapply(self, model: nn.Module, steps: int | None) -> None:
        """Applies the recipe for another run with the existing optimizer."""
        if not self._fresh:
            self.remove()
            self.callbacks = make_callbacks(self._recipe, model, None, steps, self._args.seed)
            self.passes = [one for one in self.callbacks if isinstance(one, Passes)]
            self._fresh = True

    def begin(self, step: int) -> None:
        """Sets the rates of the step at which a run begins or is resumed."""
        self._fresh = False
        self.callbacks.step(step)

    def save(self, folder: str) -> None:
        """Writes the state of the callbacks into the folder of a checkpoint."""
        if self.callbacks:
            torch.save(self.callbacks.state_dict(), os.path.join(folder, SAVED))

    def load(self, folder: str) -> None:
        """Restores the state that `save` wrote; `ValueError` if it is that of another recipe."""
        if os.path.isfile(file := os.path.join(folder, SAVED)):
            self.callbacks.load_state_dict(torch.load(file, weights_only=True))

    def remove(self) -> None:
        """Leaves the model as it was before."""
        self.callbacks.remove()
        self.callbacks, self.passes, self._fresh = Callbacks(), [], False


class RDropModel:
    """A model that passes each input twice, with different dropout masks, for `Trainer.compute_loss`.

    Models that take `num_items_in_batch` and leave it unused (T5 and BART of transformers 5.23) return the
    mean over each micro-batch as their loss, which Trainer adds up instead of averaging; the divergence stays
    a mean and weighs less.  `trainer.model_accepts_loss_kwargs = False` mends both.
    """

    def __init__(self, model: nn.Module, alpha: float) -> None:
        self._model, self._alpha = model, alpha

    def __call__(self, num_items_in_batch: Any = None, **inputs: Any) -> dict[str, Any]:
        """Returns the loss, and the logits of the first pass."""
        result = r_drop(self._model, inputs, self._alpha, num_items_in_batch=num_items_in_batch)
        return {"loss": result.loss, "logits": result.logits}
