"""What the sections of a recipe stand for: components, groups, schedules and callbacks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .. import nn as ours
from .. import optim, schedules
from ..common import validation
from ..layerwise.setting import by_role
from .callbacks import Callback, Callbacks, SharpnessAware
from .effects import (
    Adversarial,
    Agreement,
    AttachedTokenNoise,
    DropoutRates,
    Noise,
    NoisyWeights,
    behind_branches,
)
from .fields import unknown
from .sections import SECTIONS

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": optim.AdamW, "adam": optim.Adam, "sgd": optim.SGD, "lion": optim.Lion,
}  # fmt: skip
MANY_STEPS = 1_000_000
"""A run for which a recipe is tried when it is made; shares of the run are whole numbers of steps in it."""


def assemble(
    recipe: Any, model: nn.Module, lr: float | None, steps: int | None, seed: int | None
) -> tuple[Any, Callbacks]:
    """See `Regularization.apply`."""
    levels = factors(recipe, steps)
    rates = [_rates(section, f"dropout{where}", steps) for where, section in _each(recipe.dropout)]
    made = optimizer(recipe, groups(recipe, model, lr), lr, steps, seed)
    callbacks = Callbacks()
    try:
        if rates:
            callbacks.append(_told_where("dropout", DropoutRates, model, rates))
        for name, make in _EFFECTS.items():
            if (section := vars(recipe)[name]) is not None:
                callbacks.append(_told_where(name, make, model, section, levels.get(name), seed))
        if recipe.sam is not None:
            callbacks.append(SharpnessAware(made, model))
    except BaseException:
        callbacks.remove()
        raise
    return made, callbacks


def check(recipe: Any) -> None:
    """Try everything that needs no model.

    Raises:
        ValueError: For values out of range, and what does not go together.
    """
    if recipe.sam is not None and recipe.msam is not None:
        raise ValueError(
            "sam and msam both perturb the weights that gradients are taken at: choose sam (two backward "
            "passes) or msam (one)"
        )
    for where, section in _each(recipe.dropout):
        _rates(section, f"dropout{where}", MANY_STEPS)
    pace: Any = (recipe.lr_decay or {}).get("rate", 1.0)
    if not 0 < pace <= 1:
        raise ValueError(f"lr_decay: rate must be in (0, 1], got rate={pace!r}")
    names = [section.get("name", "ema") for _, section in _each(recipe.ema)]
    for name in names:
        if names.count(name) > 1 or name in ("swa", "slow", "msam"):
            raise ValueError(f"ema: each average needs a name of its own, got {name!r}")
    noise = dict(recipe.embedding_noise or {})
    if {"alpha", "std"} <= set(noise):
        raise ValueError(f"embedding_noise: give either alpha or std, got {noise}")
    factors(recipe, MANY_STEPS)
    weight = nn.Parameter(torch.zeros(2, 2))
    for name, tried in _TRIED.items():
        if (section := vars(recipe)[name]) is not None:
            _told_where(name, tried, weight, section)
    optimizer(recipe, [weight], None, MANY_STEPS, None)


def factors(recipe: Any, steps: int | None) -> dict[str, schedules.Schedule]:
    """How levels of noise change with the step."""
    sections = {name: vars(recipe)[name] or {} for name in _EFFECTS}
    return {
        name: annealed(section["annealing"], f"{name}.annealing", steps)
        for name, section in sections.items()
        if "annealing" in section
    }


def optimizer(recipe: Any, params: Any, lr: float | None, steps: int | None, seed: int | None) -> Any:
    """The optimizer, within `fastreg.SAM` if asked."""
    settings = dict(recipe.optimizer)
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
    decay: Any = recipe.weight_decay or {}
    settings |= {"weight_decay": decay.get("rate", 0.0), "decay": decay.get("kind"), "seed": seed}
    settings["regularizers"] = _components(recipe, steps)
    if lr is not None:
        settings["lr"] = lr
    if recipe.sam is None:
        return _told_where("optimizer", make, params, **settings)
    sam: Any = {key: value for key, value in recipe.sam.items() if key != "perturb"}
    sam["adaptive"] = bool(sam.get("adaptive", False))
    sam["start_step"] = _resolved(sam.get("start_step", 0), steps, "sam.start_step")
    return _told_where("optimizer or sam", optim.SAM, params, make, **sam, **settings)


def _components(recipe: Any, steps: int | None) -> list[optim.Component]:
    """What goes into the optimizer's pass; of several averages, the first is evaluated."""
    clip: Any = dict(recipe.clip or {})
    components: list[optim.Component] = []

    def add(where: str, make: Callable[..., optim.Component], settings: Any, **renamed: Any) -> None:
        components.append(_told_where(where, make, **{**settings, **renamed}))

    if recipe.clip is not None:
        if "value" in clip:
            add("clip.value", optim.ClipValue, {}, clip_value=clip.pop("value"))
        if "adaptive" in clip:
            add("clip.adaptive", optim.AdaptiveClip, {}, clipping=clip.pop("adaptive"))
        if "norm_type" in clip and "max_norm" not in clip:
            raise ValueError(f"clip: norm_type goes with max_norm, got {recipe.clip!r}")
        if clip or not components:
            add("clip", optim.ClipNorm, {"max_norm": 1.0, **clip})
    if recipe.gradient_noise is not None:
        add("gradient_noise", optim.GradientNoise, {"std": 1e-3, **recipe.gradient_noise})
    for where, section in _each(recipe.ema):
        start = _resolved(section.get("start", 0), steps, f"ema{where}.start")
        add(f"ema{where}", optim.EMA, section, start=start)
    if recipe.swa is not None:
        start = max(_resolved(recipe.swa.get("start", 0.75), steps, "swa.start"), 1)
        add("swa", optim.SWA, recipe.swa, start=start)
    if recipe.lookahead is not None:
        add("lookahead", optim.SlowWeights, recipe.lookahead)
    if recipe.msam is not None:
        add("msam", optim.MSAM, recipe.msam)
    if recipe.l1 is not None:
        add("l1", optim.L1, {"strength": 1e-4, **recipe.l1})
    if recipe.l2sp is not None:
        add("l2sp", optim.L2SP, {"strength": 1e-3, **recipe.l2sp})
    return components


def groups(recipe: Any, model: nn.Module, lr: float | None) -> Any:
    """Parameter groups, where parameters are not all alike."""
    decay: Any = recipe.weight_decay or {}
    sam: Any = recipe.sam or {}
    layers: Any = recipe.lr_decay
    rate, exclude = decay.get("rate", 0.0), decay.get("exclude", True)
    perturb, adaptive = sam.get("perturb", "all"), sam.get("adaptive")
    adaptive = "weights" if adaptive == "weights" else None
    if layers is None and perturb == "all" and adaptive is None and not (rate and exclude):
        return list(model.parameters())
    lr_decay = None if layers is None else layers.get("rate", 0.9)
    found = optim.param_groups(model, rate, lr, lr_decay, perturb=perturb, adaptive=adaptive)
    if perturb == "norms" and all(group.get("rho") == 0 for group in found):
        raise ValueError(f"sam.perturb is 'norms', and {type(model).__name__} has none: choose 'all'")
    if not exclude:
        for group in found:
            group |= {"weight_decay": rate, "name": group["name"].replace(", no decay", ", vectors")}
    return found


def _without(section: Mapping[str, Any], *keys: str, **defaults: Any) -> dict[str, Any]:
    """The settings without some, over defaults."""
    return {**defaults, **{key: value for key, value in section.items() if key not in keys}}


def _embedding_noise(model: nn.Module, section: Any, factor: Any, seed: int | None) -> Callback:
    attached = ours.attach_embedding_noise(model, **_without(section, "annealing"))
    return Noise("embedding_noise", attached, factor)


def _activation_noise(model: nn.Module, section: Any, factor: Any, seed: int | None) -> Callback:
    pattern: Any = section["pattern"] if "pattern" in section else behind_branches(model)
    settings = _without(section, "annealing", "pattern", std=0.05)
    return Noise("activation_noise", ours.attach_activation_noise(model, pattern, **settings), factor)


def _token_noise(model: nn.Module, section: Any, factor: Any, seed: int | None) -> Callback:
    return Noise(
        "token_noise", AttachedTokenNoise(model, **_without(section, "annealing", rate=0.05)), factor
    )


def _weight_noise(model: nn.Module, section: Any, factor: Any, seed: int | None) -> Callback:
    settings = _without(section, "annealing", std=0.01)
    return NoisyWeights(optim.WeightNoise(model.parameters(), **settings, seed=seed), factor)


def _adversarial(model: nn.Module, section: Any, factor: Any, seed: int | None) -> Callback:
    from ..adversarial import FGM

    return Adversarial(FGM(model, **_without(section, "method")))


def _r_drop(model: nn.Module, section: Any, factor: Any, seed: int | None) -> Callback:
    return Agreement(model, section.get("alpha", 1.0))


_EFFECTS: dict[str, Callable[..., Callback]] = {
    "embedding_noise": _embedding_noise, "activation_noise": _activation_noise, "token_noise": _token_noise,
    "r_drop": _r_drop, "weight_noise": _weight_noise, "adversarial": _adversarial,
}  # fmt: skip
"""What acts on the model and on passes, from the inside out: SAM's two passes are around all."""

_TRIED: dict[str, Callable[..., Any]] = {
    "embedding_noise": lambda w, section: ours.EmbeddingNoise(**_without(section, "annealing")),
    "activation_noise": lambda w, section: ours.ActivationNoise(**_without(section, "annealing", "pattern")),
    "token_noise": lambda w, section: ours.TokenNoise(section.get("rate", 0.05), 2),
    "weight_noise": lambda w, section: optim.WeightNoise([w], **_without(section, "annealing", std=0.01)),
    "adversarial": lambda w, section: validation.check_range("epsilon", section.get("epsilon", 1.0), 0),
    "r_drop": lambda w, section: validation.check_range("alpha", section.get("alpha", 1.0), 0),
}
"""Made without a model, for what they refuse."""


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
        rates = [_told_where(where, validation.check_rate, "rate", value) for value in layers]
    elif rate is not None or times is None:
        rates = _told_where(where, validation.check_rate, "rate", 0.1 if rate is None else rate)
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
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from error
