"""One declarative object that combines regularizers: `Regularization`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from . import assembly
from .callbacks import Callbacks
from .fields import unknown, whole
from .sections import SECTIONS

Setting = float | str | bool | Mapping[str, Any] | Sequence[Any] | None
"""Settings by name; a bare value for the most important one; `True` for the defaults; `None`: off."""


@dataclass(frozen=True)
class Regularization:
    """Everything that regularizes a training run, as data: what is not named is off.

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

    A field takes settings by name, a bare value for the most important one (named first below), `True` for
    the defaults.  `fastreg recipe` prints all of them with comments, as YAML.  Durations are steps as
    integers, or shares of the run as floats up to 1.0.

    Values, names and combinations are checked here; what needs the model, in `apply`, before it changes
    anything.

    Passes multiply: `sam` and `adversarial` double the backward passes of a step, `r_drop` the forward
    passes.  They are nested in this order, so that SAM minimizes the sharpness of the loss with both.

    Args:
        optimizer: `name` ("adamw", "adam", "sgd" or "lion") and its options, such as `betas`.
        weight_decay: `rate`, `kind`, `exclude` (biases and norms, by default).
        lr_decay: `rate` from each layer to the one before.
        dropout: `rate`, or `layers` ("linear" with `base` and `increase`, "path" with `rate`, or a list);
            `annealing`, `roles`, `inject`, `levels`.  A list of such sets several roles.
        clip: `max_norm`, `norm_type`, `value`, `adaptive`.
        gradient_noise: `std`, `gamma`, `relative`.
        embedding_noise: `alpha` or `std`, `length`, `annealing`: NEFTune.
        activation_noise: `std`, `pattern` of module names (by default behind attention and MLP), `kind`,
            `annealing`.
        token_noise: `rate`, `special_tokens`, `annealing`.
        weight_noise: `std`, `relative`, `annealing`.
        adversarial: `method` ("fgm"), `epsilon`, `modules`.
        r_drop: `alpha`.
        sam: `rho`, `adaptive`, `eta`, `interval`, `start_step`, `perturb`, `rounding`.
        msam: `rho`.
        lookahead: `k`, `alpha`, `pullback_momentum`.
        ema: `decay`, `name`, `start`, `every`, `warmup`.  A list of such keeps several.
        swa: `start`, `every`.
        l1: `strength`.
        l2sp: `strength`.

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
        assembly.check(self)

    # As data --------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Regularization:
        """A recipe from fields by name.

        Raises:
            ValueError: For names that there are not, and as the class.
        """
        if not isinstance(settings, Mapping):
            raise ValueError(f"a recipe is a mapping of fields to settings, got {settings!r:.60}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                raise ValueError(unknown("a recipe has no field", name, known))
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are on, with settings of plain types: `from_dict` makes the same recipe of it."""
        return {name: _copied(value) for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_yaml(cls, path: str | Path) -> Regularization:
        """A recipe from a file.

        Args:
            path: A YAML file of fields and settings, UTF-8.

        Raises:
            ImportError: Without pyyaml.
            OSError: If it cannot be read.
            ValueError: If it is no such file, with its name; for names that are there twice, and for sections
                with nothing in them.
        """
        yaml = _yaml()
        try:
            settings = _read(yaml, Path(path).read_text(encoding="utf-8"))
            return cls.from_dict({} if settings is None else settings)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The recipe as YAML, written to a file if one is named.

        Raises:
            ImportError: Without pyyaml.
            OSError: If it cannot be written.
        """
        written = _yaml().safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None)
        if path is not None:
            Path(path).write_text(written, encoding="utf-8")
        return written

    def describe(self) -> str:
        """A short table of what is on."""
        rows = [(name, _told(value)) for name, value in vars(self).items() if value is not None]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {told}" for name, told in rows)

    def __str__(self) -> str:
        return self.describe()

    # At work --------------------------------------------------------------------------------------------

    def apply(
        self, model: nn.Module, lr: float | None = None, steps: int | None = None, seed: int | None = None
    ) -> tuple[Any, Callbacks]:
        """Make the optimizer, set the rates of the model, attach what acts on it.

        A model is left as it was where an error is raised.

        Args:
            model: The model.
            lr: Learning rate, ≥ 0; the optimizer's default by default.
            steps: Optimizer steps of the whole run, ≥ 1; needed for durations that are shares of it.
            seed: Base of the random numbers of optimizer and weight noise; from `torch.initial_seed()` by
                default.

        Returns:
            The optimizer, a fastreg optimizer or `fastreg.SAM` around one, and what accompanies it, see
            `fastreg.recipe.callbacks`.

        Raises:
            TypeError: If the model is none, or does not tell its embeddings where these get noise.
            ValueError: For values out of range, for shares of a run of unknown length, and for what the model
                has no place for.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"apply() takes a model, got {type(model).__name__}")
        if steps is not None and (steps := whole("steps", steps)) < 1:
            raise ValueError(f"steps must be a whole number >= 1, got {steps=}")
        return assembly.assemble(self, model, lr, steps, seed)


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _told(value: Any) -> str:
    """Settings in a line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_told(item)}" for key, item in value.items()) or "defaults"
    if isinstance(value, list):
        many = any(isinstance(item, Mapping) for item in value)
        return ("; " if many else " ").join(map(_told, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _read(yaml: Any, text: str) -> Any:
    """YAML, where a name that is there twice and a section left empty are errors."""

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.value in seen:
                    raise ValueError(f"line {key.start_mark.line + 1}: {key.value!r} is there twice")
                seen.add(key.value)
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
