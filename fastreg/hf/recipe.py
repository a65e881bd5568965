"""A recipe at work in a Trainer: what it takes from `TrainingArguments`, and what they must not say as well."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..callbacks import Callbacks, Passes, SharpnessAware
from ..recipe import Regularization

Recipe = Regularization | Mapping[str, Any] | str | PathLike[str]
"""A recipe, its fields as a dictionary, or a YAML file of them."""

OPTIMIZER_ARGUMENTS = ("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")


def read(recipe: Recipe) -> Regularization:
    """The recipe itself.

    Raises:
        OSError: If a file cannot be read.
        TypeError: For anything else than a recipe.
        ValueError: As `Regularization`.
    """
    if isinstance(recipe, Regularization):
        return recipe
    if isinstance(recipe, Mapping):
        return Regularization.from_dict(recipe)
    if isinstance(recipe, (str, PathLike)):
        return Regularization.from_yaml(recipe)  # type: ignore[arg-type]
    raise TypeError(
        f"recipe must be a fastreg.Regularization, a dictionary of its fields or a YAML file, got {recipe!r:.60}"
    )


def check(args: Any) -> None:
    """Refuse arguments of an optimizer that there will not be.

    Raises:
        ValueError: If one has another value than by default.
    """
    for field in dataclasses.fields(TrainingArguments):
        if field.name not in OPTIMIZER_ARGUMENTS:
            continue
        made = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if made else field.default  # type: ignore[misc]
        if (value := getattr(args, field.name)) != default:
            raise ValueError(
                f"the recipe makes the optimizer, and TrainingArguments has {field.name}={value!r}: say it in the "
                "recipe (weight_decay=..., optimizer={'betas': ...}) and leave the argument out"
            )


class AppliedRecipe:
    """Applies a recipe, undoes it at the end of training, and applies it again for more training.

    Args:
        recipe: The recipe.
        args: The `TrainingArguments`.
    """

    def __init__(self, recipe: Regularization, args: Any) -> None:
        check(args)
        self.recipe, self._args = recipe, args
        self.callbacks = Callbacks()
        self._at_work: nn.Module | None = None

    def optimizer(self, model: nn.Module, steps: int | None) -> Any:
        """Apply it to a model.

        Args:
            model: The model.
            steps: Optimizer steps of the whole run.

        Returns:
            The optimizer.
        """
        self.remove()
        optimizer, callbacks = self.recipe.apply(
            model, lr=self._args.learning_rate, steps=steps, seed=self._args.seed
        )
        # SAM's second pass is made for all micro-batches of a step together.
        self.callbacks = Callbacks(one for one in callbacks if not isinstance(one, SharpnessAware))
        self._at_work = model
        return optimizer

    def begin(self, model: nn.Module, steps: int, step: int) -> None:
        """Before training: be at work, with the rates of a step."""
        if self._at_work is not model:
            self.optimizer(model, steps)  # what acts on the model; the optimizer is there already
        for callback in self.callbacks:
            if not isinstance(callback, Passes):  # they check what was done before
                callback.step(step)

    def remove(self) -> None:
        """Leave the model as it was before."""
        self.callbacks.remove()
        self.callbacks, self._at_work = Callbacks(), None
