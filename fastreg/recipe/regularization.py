"""One declarative object that combines regularizers: `Regularization`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from ..common.validation import check_int, check_known
from . import build
from .callbacks import Callbacks
from .sections import SECTIONS

Setting = float | str | bool | Mapping[str, Any] | Sequence[Any] | None
"""Settings by name; a bare value for the most important one; `True` for the defaults; `None`: off."""


@dataclass(frozen=True)
class Regularization:
    """Everything that regularizes a training run, as data; fields that are left out are off.

    ```python
    recipe = fastreg.Regularization(
        weight_decay=0.1, clip=1.0, ema=0.999,
        dropout={"layers": "linear", "base": 0.1, "increase": 0.02},
    )
    optimizer, callbacks = recipe.apply(model, lr=3e-4, steps=10_000)
    for batch in data:
        callbacks.training_step(lambda: model(**batch).loss, optimizer)
        callbacks.step()
    ```

    A field takes settings by name, a bare value for the most important one, or `True` for the defaults.
    `fastreg recipe` prints all settings with their meaning and their defaults, as YAML.  `dropout` and `ema`
    take a list, too.  Durations are steps as integers, or shares of the run as floats up to 1.0.

    Values, names and combinations are checked when the recipe is made; what needs the model, in `apply`,
    before the model is changed.

    Passes multiply: `sam` and `adversarial` double the backward passes of a step, `r_drop` the forward
    passes.  They are nested in this order, so that SAM minimizes the sharpness of the loss with both.

    Raises:
        ValueError: For unknown settings, values out of range, and what does not go together.
    """

    optimizer: Setting = "adamw"
    weight_decay: Setting = None
    lr_decay: Setting = None
    dropout: Setting = None
    clip: Setting = None
    gradient_noise: Setting = None
    embedding_noise: Setting = None
    activation_noise: Setting = None
    token_noise: Setting = None
    weight_noise: Setting = None
    adversarial: Setting = None
    r_drop: Setting = None
    sam: Setting = None
    msam: Setting = None
    lookahead: Setting = None
    ema: Setting = None
    swa: Setting = None
    l1: Setting = None
    l2sp: Setting = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = SECTIONS[field.name].read(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if self.optimizer is None:
            object.__setattr__(self, "optimizer", {"name": "adamw"})
        build.check(self)

    # As data --------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Regularization:
        """Returns a recipe made of fields by name.

        Raises:
            ValueError: For unknown names, and as the class.
        """
        if not isinstance(settings, Mapping):
            raise ValueError(f"a recipe is a mapping of fields to settings, got {settings!r:.60}")
        check_known("a recipe has no field", settings, [field.name for field in dataclasses.fields(cls)])
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields that are on, as plain types from which `from_dict` makes the same recipe."""
        return {name: copy.deepcopy(value) for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_yaml(cls, path: str | Path) -> Regularization:
        """Returns a recipe read from a file.

        Args:
            path: A YAML file of fields and settings, UTF-8.

        Raises:
            ImportError: Without pyyaml.
            OSError: If it cannot be read.
            ValueError: If it is no such file, with its name; for repeated names and for empty sections.
        """
        yaml = _yaml()
        try:
            settings = _read(yaml, Path(path).read_text(encoding="utf-8"))
            return cls.from_dict({} if settings is None else settings)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def to_yaml(self, path: str | Path | None = None) -> str:
        """Returns the recipe as YAML, and writes it to a file if one is named.

        Raises:
            ImportError: Without pyyaml.
            OSError: If it cannot be written.
        """
        written = _yaml().safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None)
        if path is not None:
            Path(path).write_text(written, encoding="utf-8")
        return written

    def describe(self) -> str:
        """Returns a short table of the sections that are on."""
        rows = [(name, _described(value)) for name, value in vars(self).items() if value is not None]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)

    def __str__(self) -> str:
        return self.describe()

    # At work --------------------------------------------------------------------------------------------

    def apply(
        self, model: nn.Module, lr: float | None = None, steps: int | None = None, seed: int | None = None
    ) -> tuple[Any, Callbacks]:
        """Makes the optimizer, sets the rates of the model, and attaches noise and passes to it.

        A model is left as it was where an error is raised.

        Args:
            model: The model; what `DistributedDataParallel` and the like wrap is found in it.
            lr: Learning rate, ≥ 0; the optimizer's default by default.
            steps: Optimizer steps of the whole run, ≥ 1; needed for durations that are shares of it.
            seed: Base of the random numbers of optimizer and weight noise; from `torch.initial_seed()` by
                default.

        Returns:
            The optimizer, a fastreg optimizer or `fastreg.SAM` around one, and its callbacks, see
            `fastreg.recipe.callbacks`.

        Raises:
            TypeError: If the model is no module, or has no `get_input_embeddings()` where these get noise.
            ValueError: For values out of range, for shares of a run of unknown length, and for settings that
                do not fit the model.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"apply() takes a model, got {type(model).__name__}")
        if steps is not None:
            steps = check_int("steps", steps)
        return build.build(self, model, lr, steps, seed)


def _described(value: Any) -> str:
    """Returns settings in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_described(item)}" for key, item in value.items()) or "defaults"
    if isinstance(value, list):
        many = any(isinstance(item, Mapping) for item in value)
        return ("; " if many else " ").join(map(_described, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _read(yaml: Any, text: str) -> Any:
    """Returns the contents of YAML; repeated names and empty sections are errors."""

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for i, key in enumerate(keys):
                if any(key.value == other.value for other in keys[:i]):
                    raise ValueError(f"line {key.start_mark.line + 1}: {key.value!r} is there twice")
            return super().construct_mapping(node, deep)

    settings = yaml.load(text, Loader)
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if value is None:
            raise ValueError(
                f"{name}: nothing is in it; write {name}: true for the defaults, or {name}: false for off"
            )
    return settings


def _yaml() -> Any:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError("recipes in YAML need pyyaml: pip install pyyaml, or use from_dict") from None
    return yaml


Recipe = Regularization | Mapping[str, Any] | str | PathLike[str]
"""A recipe, its fields as a dictionary, or a YAML file of them."""


def read_recipe(recipe: Recipe) -> Regularization:
    """Returns the recipe that is given in one of the forms of `Recipe`.

    Raises `TypeError` for anything else, and the errors of `Regularization` and `from_yaml`.
    """
    if isinstance(recipe, Regularization):
        return recipe
    if isinstance(recipe, Mapping):
        return Regularization.from_dict(recipe)
    if isinstance(recipe, (str, PathLike)):
        return Regularization.from_yaml(recipe)  # type: ignore[arg-type]
    raise TypeError(
        "recipe must be a fastreg.Regularization, a dictionary of its fields or a YAML file, got "
        f"{recipe!r:.60}"
    )
