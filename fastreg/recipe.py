"""One declarative object that combines regularizers: `Regularization`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import layerwise, optim, schedules
from .callbacks import Callback, Callbacks, SharpnessAware
from .layerwise.apply import remembered
from .layerwise.setting import by_role
from .sections import SECTIONS, unknown

Setting = float | str | bool | Mapping[str, Any] | Sequence[Any] | None
"""Settings by name; a bare value for the most important one; `True` for the defaults; `None`: off."""

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": optim.AdamW, "adam": optim.Adam, "sgd": optim.SGD, "lion": optim.Lion,
}  # fmt: skip
MANY_STEPS = 1_000_000
"""A run for which a recipe is tried when it is made; shares of the run are whole numbers of steps in it."""


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
    the defaults.  `fastreg recipe` prints all of them with comments, as YAML.  Durations are steps as integers,
    or shares of the run as floats up to 1.0.

    Values, names and combinations are checked here; what needs the model, in `apply`, before it changes
    anything.

    Args:
        optimizer: `name` ("adamw", "adam", "sgd" or "lion") and its options, such as `betas`.
        weight_decay: `rate`, `kind`, `exclude` (biases and norms, by default).
        lr_decay: `rate` from each layer to the one before.
        dropout: `rate`, or `layers` ("linear" with `base` and `increase`, "path" with `rate`, or a list);
            `annealing`, `roles`, `inject`, `levels`.  A list of such sets several roles.
        clip: `max_norm`, `norm_type`, `value`, `adaptive`.
        gradient_noise: `std`, `gamma`, `relative`.
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
        self._check()

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
            ValueError: If it is no such file, with its name.
        """
        yaml = _yaml()
        try:
            settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
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
            `fastreg.callbacks`.

        Raises:
            TypeError: If the model is none.
            ValueError: For values out of range, for shares of a run of unknown length, and for what the model
                has no place for.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"apply() takes a model, got {type(model).__name__}")
        if steps is not None and (isinstance(steps, bool) or steps != int(steps) or steps < 1):
            raise ValueError(f"steps must be a whole number >= 1, got {steps=}")
        rates = [_rates(section, f"dropout{where}", steps) for where, section in _each(self.dropout)]
        optimizer = self._optimizer(self._groups(model, lr), lr, steps, seed)
        callbacks = Callbacks()
        try:
            if rates:
                callbacks.append(DropoutRates(model, rates))
            if self.sam is not None:
                callbacks.append(SharpnessAware(optimizer, model))
        except BaseException:
            callbacks.remove()
            raise
        return optimizer, callbacks

    def _check(self) -> None:
        """Try everything that needs no model."""
        if self.optimizer is None:
            object.__setattr__(self, "optimizer", {"name": "adamw"})
        if self.sam is not None and self.msam is not None:
            raise ValueError(
                "sam and msam both perturb the weights that gradients are taken at: choose sam (two backward "
                "passes) or msam (one)"
            )
        for where, section in _each(self.dropout):
            _rates(section, f"dropout{where}", MANY_STEPS)
        names = [section.get("name", "ema") for _, section in _each(self.ema)]
        for name in names:
            if names.count(name) > 1 or name in ("swa", "slow", "msam"):
                raise ValueError(f"ema: each average needs a name of its own, got {name!r}")
        self._optimizer([nn.Parameter(torch.zeros(2, 2))], None, MANY_STEPS, None)

    def _optimizer(self, params: Any, lr: float | None, steps: int | None, seed: int | None) -> Any:
        settings = dict(self.optimizer)  # type: ignore[call-overload]
        name = settings.pop("name", "adamw")
        make = OPTIMIZERS[name]
        accepted = inspect.signature(make).parameters
        for option in settings:
            if option not in accepted:
                own = [key for key in SECTIONS["optimizer"].keys if key in accepted]
                raise ValueError(unknown(f"optimizer: {name} has no option", option, own))
        if "state_dtype" in settings:
            settings["state_dtype"] = getattr(torch, settings["state_dtype"])
        if "betas" in settings:
            settings["betas"] = tuple(settings["betas"])
        decay: Any = self.weight_decay or {}
        settings |= {"weight_decay": decay.get("rate", 0.0), "decay": decay.get("kind"), "seed": seed}
        settings["regularizers"] = self._pieces(steps)
        if lr is not None:
            settings["lr"] = lr
        if self.sam is None:
            return _told_where("optimizer", make, params, **settings)
        sam: Any = {key: value for key, value in self.sam.items() if key != "perturb"}  # type: ignore[union-attr]
        sam["adaptive"] = bool(sam.get("adaptive", False))
        sam["start_step"] = _resolved(sam.get("start_step", 0), steps, "sam.start_step")
        return _told_where("optimizer or sam", optim.SAM, params, make, **sam, **settings)

    def _pieces(self, steps: int | None) -> list[optim.Piece]:
        """What goes into the optimizer's pass; of several averages, the first is evaluated."""
        clip: Any = dict(self.clip or {})  # type: ignore[call-overload]
        pieces: list[optim.Piece] = []

        def add(where: str, make: Callable[..., optim.Piece], settings: Any, **renamed: Any) -> None:
            pieces.append(_told_where(where, make, **{**settings, **renamed}))

        if self.clip is not None:
            if "value" in clip:
                add("clip.value", optim.ClipValue, {}, clip_value=clip.pop("value"))
            if "adaptive" in clip:
                add("clip.adaptive", optim.AdaptiveClip, {}, clipping=clip.pop("adaptive"))
            if "norm_type" in clip and "max_norm" not in clip:
                raise ValueError(f"clip: norm_type goes with max_norm, got {self.clip!r}")
            if clip or not pieces:
                add("clip", optim.ClipNorm, {"max_norm": 1.0, **clip})
        if self.gradient_noise is not None:
            add("gradient_noise", optim.GradientNoise, {"std": 1e-3, **self.gradient_noise})  # type: ignore[dict-item]
        for where, section in _each(self.ema):
            start = _resolved(section.get("start", 0), steps, f"ema{where}.start")
            add(f"ema{where}", optim.EMA, section, start=start)
        if self.swa is not None:
            start = max(_resolved(self.swa.get("start", 0.75), steps, "swa.start"), 1)  # type: ignore[union-attr]
            add("swa", optim.SWA, self.swa, start=start)
        if self.lookahead is not None:
            add("lookahead", optim.SlowWeights, self.lookahead)
        if self.msam is not None:
            add("msam", optim.MSAM, self.msam)
        if self.l1 is not None:
            add("l1", optim.L1, {"strength": 1e-4, **self.l1})  # type: ignore[dict-item]
        if self.l2sp is not None:
            add("l2sp", optim.L2SP, {"strength": 1e-3, **self.l2sp})  # type: ignore[dict-item]
        return pieces

    def _groups(self, model: nn.Module, lr: float | None) -> Any:
        """Parameter groups, where parameters are not all alike."""
        decay: Any = self.weight_decay or {}
        sam: Any = self.sam or {}
        layers: Any = self.lr_decay
        rate, exclude = decay.get("rate", 0.0), decay.get("exclude", True)
        perturb, adaptive = sam.get("perturb", "all"), sam.get("adaptive")
        adaptive = "weights" if adaptive == "weights" else None
        if layers is None and perturb == "all" and adaptive is None and not (rate and exclude):
            return list(model.parameters())
        lr_decay = None if layers is None else layers.get("rate", 0.9)
        groups = optim.param_groups(model, rate, lr, lr_decay, perturb=perturb, adaptive=adaptive)
        if not exclude:
            for group in groups:
                group |= {"weight_decay": rate, "name": group["name"].replace(", no decay", ", vectors")}
        return groups


class DropoutRates(Callback):
    """Dropout rates that were set, and those that change with the step."""

    name = "dropout"

    def __init__(self, model: nn.Module, sections: list[dict[str, Any]]) -> None:
        self._undo = remembered(model)
        self._schedulers = []
        try:
            for section in sections:
                if "schedule" in section:
                    self._schedulers.append(layerwise.DropoutScheduler(model, **section))
                else:
                    layerwise.set_dropout(model, section["layers"], section["roles"], section["inject"])
        except BaseException:
            self._undo()
            raise

    def step(self, step: int | None = None) -> None:
        """Set the rates of the next step."""
        for scheduler in self._schedulers:
            scheduler.step(step)

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {"last_step": [scheduler.last_step for scheduler in self._schedulers]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set the rates of the step that was saved."""
        for scheduler, step in zip(self._schedulers, state_dict["last_step"], strict=True):
            scheduler.step(step)

    def remove(self) -> None:
        """Rates, modules and hooks as they were."""
        self._schedulers = []
        self._undo()


def _rates(section: Mapping[str, Any], where: str, steps: int | None) -> dict[str, Any]:
    """The arguments of `DropoutScheduler`, or of `set_dropout` where there is no schedule."""
    layers, rate, times = section.get("layers"), section.get("rate"), section.get("annealing")
    linear = {key for key in ("base", "increase") if key in section}
    if linear and layers != "linear":
        raise ValueError(f"{where}: {', '.join(sorted(linear))} goes with layers: linear, got {layers=}")
    if rate is not None and layers is not None and layers != "path":
        raise ValueError(f"{where}: give either a rate or layers: {layers!r}, got {rate=}")
    rates: Any = rate
    if layers == "linear":
        rates = _told_where(
            where, schedules.LinearLayers, section.get("base", 0.1), section.get("increase", 0.0)
        )
    elif layers == "path":
        rates = _told_where(where, schedules.DropPathLayers, 0.1 if rate is None else rate)
    elif layers is not None:
        rates = [_told_where(where, schedules.checked, value, "rate") for value in layers]
    elif rate is not None or times is None:
        rates = _told_where(where, schedules.checked, 0.1 if rate is None else rate, "rate")
    roles = tuple(section.get("roles", ("hidden",)))
    _told_where(f"{where}.roles", by_role, 0.0, roles)
    result = {"layers": rates, "roles": roles, "inject": section.get("inject", False)}
    if times is None:
        if "levels" in section:
            raise ValueError(f"{where}: levels goes with annealing, got levels={section['levels']}")
        return result
    if "levels" in section:
        result["levels"] = section["levels"]
    return result | {"schedule": annealed(times, f"{where}.annealing", steps)}


def annealed(section: Mapping[str, Any], where: str, steps: int | None) -> schedules.Schedule:
    """A function of the step from what a recipe says."""
    kind = section.get("schedule", "linear")
    start, end = section.get("start", 1.0), section.get("end", 0.0)
    length = max(_resolved(section.get("steps", 1.0), steps, f"{where}.steps"), 1)
    if kind in ("early", "late"):
        if "end" in section:
            raise ValueError(f"{where}: {kind} has no end, got {end=}; the rate is start, or 0")
        return _told_where(where, {"early": schedules.Early, "late": schedules.Late}[kind], start, length)
    return _told_where(
        where, {"linear": schedules.Linear, "cosine": schedules.Cosine}[kind], start, end, length
    )


def _resolved(given: float, steps: int | None, where: str) -> int:
    """A duration in steps."""
    if isinstance(given, int):
        return given
    if steps is None:
        raise ValueError(f"{where} is {given:g} of the run: give apply() the number of its steps=")
    return round(given * steps)


def _each(sections: Any) -> list[tuple[str, dict[str, Any]]]:
    """The sections of a field that may have several, each with where it stands."""
    if isinstance(sections, list):
        return [(f"[{i}]", section) for i, section in enumerate(sections)]
    return [] if sections is None else [("", sections)]


def _told_where(where: str, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call; an error tells the field."""
    try:
        return make(*args, **kwargs)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


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


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise ImportError("recipes in YAML need pyyaml: pip install pyyaml, or use from_dict") from None
    return yaml
