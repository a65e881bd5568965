"""Factories of recipe sections for which no public class has exactly the right settings.

Their parameters are the settings, their defaults are printed by `fastreg recipe`, their `Args:` the help.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from torch import nn

from .. import nn as fastreg_nn
from .. import optim, schedules
from ..common.validation import check_rate
from ..layerwise.set_rates import by_role
from .model_callbacks import find_branches
from .readers import Duration, check_setting


class WeightDecay(NamedTuple):
    """The decay of weights towards zero.

    Args:
        rate: How fast weights decay, >= 0.
        kind: What decays: l2, decoupled, independent (of the learning rate) or cautious; by default that of
            the optimizer, l2 for adam and sgd, decoupled for others.
        exclude: Whether biases, norms and all parameters with one dimension do not decay.
    """

    rate: float = 0.01
    kind: Literal["l2", "decoupled", "independent", "cautious"] | None = None
    exclude: bool = True


class LayerDecay(NamedTuple):
    """The decay of the learning rate towards the first layer.

    Args:
        rate: Factor of the learning rate from each layer to the one before, in (0, 1].
    """

    rate: float = 0.9


def annealing(
    schedule: Literal["linear", "cosine", "early", "late"] = "linear", start: float = 1.0,
    end: float | None = None, steps: Duration = Duration(1.0),  # noqa: B008
) -> schedules.Schedule:  # fmt: skip
    """Returns a schedule of the step.

    Args:
        schedule: linear, cosine: from start to end; early: only before, late: only after the steps.
        start: Value at the first step, and all along for early and late.
        end: Value from the last of the steps on, 0 by default; early and late have none.
        steps: Duration in steps, or as 0.5 in shares of the run.
    """
    length = max(int(steps), 1)
    if schedule in ("early", "late"):
        if end is not None:
            raise ValueError(f"{schedule} has no end, got {end=}; the rate is start, or 0")
        return (schedules.Early if schedule == "early" else schedules.Late)(start, length)
    return (schedules.Linear if schedule == "linear" else schedules.Cosine)(start, end or 0.0, length)


def dropout(
    rate: float | None = None, layers: Literal["linear", "path"] | list[float] | None = None,
    base: float | None = None, increase: float | None = None, annealing: schedules.Schedule | None = None,
    roles: str | Sequence[str] = ("hidden",), inject: bool = False, levels: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Returns the arguments of `DropoutScheduler`, or of `set_dropout` where there is no schedule.

    Args:
        rate: Dropout rate in [0, 1]; with layers: path, that of the last layer.
        layers: linear: base + layer * increase; path: from 0 to rate; or a list of rates, one for each.
        base: Rate of the first layer, for layers: linear.
        increase: What each layer adds, for layers: linear.
        annealing: Schedule of a factor; without rate and layers, one that starts below 1 is the rate itself.
        roles: hidden, attention, activation, embedding, head, path, layerdrop or adapter; one or a list.
        inject: Whether to add dropout behind attention and MLP of models that have none.
        levels: How many values annealed rates take that are Python floats in the model.
    """
    linear = {"base": base, "increase": increase}
    if layers != "linear" and (stray := [name for name, value in linear.items() if value is not None]):
        raise ValueError(f"{', '.join(stray)} goes with layers: linear, got {layers=}")
    if rate is not None and layers not in (None, "path"):
        raise ValueError(f"give either a rate or layers: {layers!r}, got {rate=}")
    if levels is not None and annealing is None:
        raise ValueError(f"levels goes with annealing, got {levels=}")
    rate_itself = annealing is not None and annealing.bounds[1] < 1
    rates: Any = None
    if layers == "linear":
        rates = schedules.LinearLayers(0.1 if base is None else base, increase or 0.0)
    elif layers == "path":
        rates = schedules.DropPathLayers(0.1 if rate is None else rate)
    elif layers is not None:
        rates = [check_rate("rate", value) for value in layers]
    elif rate is not None or not rate_itself:
        rates = check_rate("rate", 0.1 if rate is None else rate)
    check_setting("roles", by_role, 0.0, roles)  # refuses unknown roles
    arguments: dict[str, Any] = {"layers": rates, "roles": roles, "inject": inject}
    if annealing is not None:
        arguments |= {"schedule": annealing} | ({} if levels is None else {"levels": levels})
    return arguments


def clip(
    max_norm: float | None = None, norm_type: float | None = None, value: float | None = None,
    adaptive: float | None = None,
) -> list[optim.Component]:  # fmt: skip
    """Returns the components that clip gradients.

    Args:
        max_norm: Largest norm of all gradients together; off by default where only others are set.
        norm_type: 2, or .inf for the largest absolute element.
        value: Largest absolute value of an element.
        adaptive: Largest share of the norm of the weights, by rows.
    """
    components: list[optim.Component] = []
    if value is not None:
        components.append(check_setting("value", optim.ClipValue, value))
    if adaptive is not None:
        components.append(check_setting("adaptive", optim.AdaptiveClip, adaptive))
    if not components or max_norm is not None or norm_type is not None:
        norm_type = 2.0 if norm_type is None else norm_type
        components.append(optim.ClipNorm(1.0 if max_norm is None else max_norm, norm_type))
    return components


def activation_noise(
    model: nn.Module, std: float = 0.05, pattern: str | None = None,
    kind: Literal["additive", "multiplicative"] = "additive",
) -> Any:  # fmt: skip
    """Attaches noise to modules of a model.

    Args:
        model: The model.
        std: Standard deviation, or a share of the activation.
        pattern: Names of the modules, such as '*.mlp'; by default attention and MLP of all layers.
        kind: additive or multiplicative.
    """
    names: Any = find_branches(model) if pattern is None else pattern
    return fastreg_nn.attach_activation_noise(model, names, std, kind)
