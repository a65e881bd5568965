"""Builds what a recipe says: optimizer, parameter groups and callbacks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import optim
from ..common.module_state import preserve_rng
from ..common.unwrap import find_optimizer, unwrap_model
from ..common.validation import check_known
from ..nn import TransformerWithDropout
from ..optim.registry import OPTIMIZERS
from .callbacks import Callback, Callbacks
from .factories import LayerDecay, WeightDecay
from .model_callbacks import Adversarial, DropoutRates, Noise, NoisyWeights, SharpnessAware
from .sections import ANNEALING, SECTIONS, call, resolve_duration

if TYPE_CHECKING:
    from .regularization import Regularization

COMPONENTS = (
    "clip", "gradient_noise", "ema", "swa", "lookahead", "msam", "l1", "l2sp",
)  # fmt: skip
"""Sections that go into the optimizer's pass; of several averages, the first is evaluated."""

EFFECTS: dict[str, Callable[[Any, Any], Callback]] = {
    "embedding_noise": functools.partial(Noise, "embedding_noise"),
    "activation_noise": functools.partial(Noise, "activation_noise"),
    "token_noise": functools.partial(Noise, "token_noise"),
    "r_drop": lambda callback, factor: callback,
    "weight_noise": functools.partial(NoisyWeights, "weight_noise"),
    "adversarial": lambda attack, factor: Adversarial(attack),
}
"""Sections that act on the model and on passes, from the inside out, and the callbacks around what they make
and its annealing; SAM's two passes are around all."""

MANY_STEPS = 1_000_000
"""The length of the run for which a recipe is checked; shares of it are whole numbers of steps."""


def build(
    recipe: Regularization, model: nn.Module, lr: float | None, steps: int | None, seed: int | None
) -> tuple[Any, Callbacks]:
    """Makes the optimizer and the callbacks of a recipe, see `Regularization.apply`."""
    optimizer = make_optimizer(recipe, make_groups(recipe, model, lr), lr, steps, seed)
    return optimizer, make_callbacks(recipe, model, optimizer, steps, seed)


def make_callbacks(
    recipe: Regularization, model: nn.Module, optimizer: Any, steps: int | None, seed: int | None
) -> Callbacks:
    """Returns the callbacks of a recipe; a model is left as it was where an error is raised.

    SAM in the optimizer makes two passes, whether the recipe made it or not.
    """
    model = unwrap_model(model)
    rates = dropout_rates(recipe, steps)
    callbacks = Callbacks()
    try:
        if rates:
            callbacks.append(call("dropout", DropoutRates, model, rates))
        for name in EFFECTS:
            if (settings := vars(recipe)[name]) is not None:
                callbacks.append(_effect(name, settings, model, steps, seed))
        if (sam := find_optimizer(optimizer, optim.SAM)) is not None:
            callbacks.append(SharpnessAware(sam, model))
    except BaseException:
        callbacks.remove()
        raise
    return callbacks


def check(recipe: Regularization) -> None:
    """Checks a recipe as far as no model is needed: builds it for a tiny stand-in.

    Raises `ValueError` for values out of range, and for settings that do not go together.
    """
    if recipe.sam is not None and recipe.msam is not None:
        raise ValueError(
            "sam and msam both perturb the weights that gradients are taken at: choose sam (two backward "
            "passes) or msam (one)"
        )
    names = [section.get("name", "ema") for _, section in _each(recipe.ema, "ema")]
    for name in names:
        if names.count(name) > 1 or name in ("swa", "slow", "msam"):
            raise ValueError(f"ema: each average needs a name of its own, got {name!r}")
    if {"alpha", "std"} <= set(noise := dict(recipe.embedding_noise or {})):  # type: ignore[arg-type]
        raise ValueError(f"embedding_noise: give either alpha or std, got {noise}")
    dropout_rates(recipe, MANY_STEPS)
    trial: Any = object.__new__(type(recipe))
    vars(trial).update(vars(recipe) | {"dropout": None})
    for name, section in SECTIONS.items():
        if section.needs_model and (settings := vars(recipe)[name]):
            vars(trial)[name] = {key: settings[key] for key in settings if key not in section.needs_model}
    with preserve_rng():
        stand_in = _StandIn(16, 4, 1, 2, max_length=4)
    build(trial, stand_in, 1e-3, MANY_STEPS, 0)[1].remove()


class _StandIn(TransformerWithDropout):
    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


def _effect(
    name: str, settings: dict[str, Any], model: nn.Module, steps: int | None, seed: int | None
) -> Callback:
    arguments = {key: item for key, item in settings.items() if key not in ("annealing", "method")}
    factor = None
    if "annealing" in settings:
        factor = ANNEALING.make(f"{name}.annealing", settings["annealing"], steps)
    inputs, more = (model.parameters(), {"seed": seed}) if name == "weight_noise" else (model, {})
    return EFFECTS[name](SECTIONS[name].make(name, arguments, steps, inputs, **more), factor)


def dropout_rates(recipe: Regularization, steps: int | None) -> list[dict[str, Any]]:
    """Returns the arguments of `DropoutRates`."""
    section = SECTIONS["dropout"]
    return [section.make(where, settings, steps) for where, settings in _each(recipe.dropout, "dropout")]


def make_optimizer(
    recipe: Regularization, params: Any, lr: float | None, steps: int | None, seed: int | None,
    regularizers: Iterable[optim.Component] = (),
) -> Any:  # fmt: skip
    """Returns the optimizer with components besides the recipe's, in `fastreg.SAM` if the recipe has it."""
    settings: dict[str, Any] = dict(recipe.optimizer)  # type: ignore[arg-type]
    name = settings.pop("name", "adamw")
    factory, accepted = OPTIMIZERS[name].optimizer, OPTIMIZERS[name].options
    options = [key for key in SECTIONS["optimizer"].keys if key in accepted]
    check_known(f"optimizer: {name} has no option", settings, options)
    if "state_dtype" in settings:
        settings["state_dtype"] = getattr(torch, settings["state_dtype"])
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    decay = weight_decay(recipe)
    settings |= {"weight_decay": decay.rate, "decay": decay.kind, "seed": seed}
    settings["regularizers"] = [*make_components(recipe, steps), *regularizers]
    if lr is not None:
        settings["lr"] = lr
    if recipe.sam is None:
        return call("optimizer", factory, params, **settings)
    sam = {key: item for key, item in dict(recipe.sam).items() if key != "perturb"}  # type: ignore[arg-type]
    sam["adaptive"] = bool(sam.get("adaptive", False))
    base_optimizer = functools.partial(call, "optimizer", factory)
    return SECTIONS["sam"].make("sam", sam, steps, params, base_optimizer, **settings)


def make_components(recipe: Regularization, steps: int | None) -> list[optim.Component]:
    """Returns the components of the optimizer's pass."""
    components: list[optim.Component] = []
    for name in COMPONENTS:
        for where, settings in _each(vars(recipe)[name], name):
            if name == "swa" and "start" in settings:  # the first step is the earliest
                settings = settings | {
                    "start": max(resolve_duration(f"{where}.start", settings["start"], steps), 1)
                }
            made = SECTIONS[name].make(where, settings, steps)
            components += made if isinstance(made, list) else [made]
    return components


def weight_decay(recipe: Regularization) -> WeightDecay:
    """Returns the weight decay of a recipe, of rate 0 where it is off."""
    return WeightDecay(**({"rate": 0.0} if recipe.weight_decay is None else recipe.weight_decay))  # type: ignore[arg-type]


def make_groups(recipe: Regularization, model: nn.Module, lr: float | None) -> Any:
    """Returns the parameters, in groups where they are not all alike."""
    model, decay, layers = unwrap_model(model), weight_decay(recipe), recipe.lr_decay
    sam: Any = recipe.sam or {}
    perturb, adaptive = sam.get("perturb", "all"), sam.get("adaptive")
    adaptive = "weights" if adaptive == "weights" else None
    if layers is None and perturb == "all" and adaptive is None and not (decay.rate and decay.exclude):
        return list(model.parameters())
    lr_decay = None if layers is None else LayerDecay(**layers).rate  # type: ignore[arg-type]
    if lr_decay is not None and not 0 < lr_decay <= 1:
        raise ValueError(f"lr_decay: rate must be in (0, 1], got rate={lr_decay!r}")
    groups = optim.param_groups(model, decay.rate, lr, lr_decay, perturb=perturb, adaptive=adaptive)
    if perturb == "norms" and all(group.get("rho") == 0 for group in groups):
        raise ValueError(f"sam.perturb is 'norms', and {type(model).__name__} has none: choose 'all'")
    if not decay.exclude:
        for group in groups:
            group |= {"weight_decay": decay.rate, "name": group["name"].replace(", no decay", ", vectors")}
    return groups


def _each(sections: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the sections of a field that may have several, each with its name."""
    if isinstance(sections, list):
        yield from ((f"{name}[{i}]", section) for i, section in enumerate(sections))
    elif sections is not None:
        yield name, sections
