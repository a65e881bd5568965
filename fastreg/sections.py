"""What a recipe may say: its sections, their keys, how values are read, and the commented template."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Read = Callable[[str, Any], Any]
"""Makes a value of what was given under a name, or raises ValueError."""


@dataclass(frozen=True)
class Key:
    """One setting of a section."""

    read: Read
    example: Any
    text: str


@dataclass(frozen=True)
class Section:
    """One regularizer, as a recipe has it: on, with settings, or off.

    Args:
        text: What it does.
        keys: Its settings.
        short: The setting that a bare value stands for.
        many: Whether a list of such is possible.
    """

    text: str
    keys: dict[str, Key]
    short: str
    many: bool = False

    def read(self, name: str, value: Any) -> dict[str, Any] | list[dict[str, Any]] | None:
        """The settings in their own types; `None` where it is off.

        Args:
            name: For errors.
            value: Settings by name; a bare value for the most important one; `True` for the defaults;
                `None` or `False` for off; a list of such where several are possible.

        Raises:
            ValueError: For unknown settings and values that cannot be read.
        """
        if value is None or value is False:
            return None
        if value is True:
            return {}
        if isinstance(value, Mapping):
            return {
                key: self._known(name, key).read(f"{name}.{key}", item)
                for key, item in value.items()
                if item is not None
            }
        if self.many and isinstance(value, Sequence) and any(isinstance(item, Mapping) for item in value):
            return [self.read(f"{name}[{i}]", item) or {} for i, item in enumerate(value)]  # type: ignore[misc]
        return {self.short: self.keys[self.short].read(name, value)}

    def _known(self, name: str, key: Any) -> Key:
        if key not in self.keys:
            raise ValueError(unknown(f"{name}: unknown setting", key, self.keys))
        return self.keys[key]


def unknown(start: str, name: Any, known: Iterable[str]) -> str:
    """A message about a name that there is not, with the most similar one that there is."""
    known = list(known)
    similar = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    return f"{start} {name!r}; " + (f"did you mean {similar[0]!r}? " if similar else "") + (
        f"There are {', '.join(known)}" if known else "There are none"
    )  # fmt: skip


def number(name: str, value: Any) -> float:
    """A float; YAML takes 1e-3 for text."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise ValueError(f"{name} must be a number, got {value!r}")


def whole(name: str, value: Any) -> int:
    """An integer."""
    given = number(name, value)
    if given != given or given in (float("inf"), float("-inf")) or int(given) != given:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(given)


def duration(name: str, value: Any) -> int | float:
    """Steps as an integer, or a share of the run as a float up to 1."""
    given = number(name, value)
    share = isinstance(value, float) or (isinstance(value, str) and not value.strip().lstrip("+-").isdigit())
    if share and 0 <= given <= 1:
        return given
    if given < 0 or given == float("inf") or int(given) != given:
        raise ValueError(
            f"{name} must be a whole number of steps, or a share of the run between 0.0 and 1.0, got {value!r}"
        )
    return int(given)


def flag(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def text(name: str, value: Any) -> str:
    """A name."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {value!r}")
    return value


def one_of(*choices: Any) -> Read:
    """One of these."""

    def read(name: str, value: Any) -> Any:
        for choice in choices:
            if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                return choice
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")

    return read


def numbers(name: str, value: Any) -> list[float]:
    """A list of numbers."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{name} must be a list of numbers, got {value!r}")
    return [number(f"{name}[{i}]", item) for i, item in enumerate(value)]


def names(name: str, value: Any) -> list[str]:
    """A list of names, or one."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, Sequence) or not given:
        raise ValueError(f"{name} must be a name or a list of names, got {value!r}")
    return [text(f"{name}[{i}]", item) for i, item in enumerate(given)]


def either(*reads: Read) -> Read:
    """The first that can read it; the last one's complaint."""

    def read(name: str, value: Any) -> Any:
        for attempt in reads[:-1]:
            try:
                return attempt(name, value)
            except ValueError:
                continue
        return reads[-1](name, value)

    return read


ANNEALING = Section(
    "How the rate changes with the step: a factor of it, or the rate itself where none is given.",
    {
        "schedule": Key(one_of("linear", "cosine", "early", "late"), "linear",
                        "linear, cosine: from start to end; early: only before, late: only after"),
        "start": Key(number, 1.0, "at the first step, and all along for early and late"),
        "end": Key(number, 0.0, "from the last of the steps on"),
        "steps": Key(duration, 1.0, "how long: steps, or as 0.5 a share of the run"),
    },
    "schedule",
)  # fmt: skip


def annealing(name: str, value: Any) -> Any:
    """A nested section."""
    read = ANNEALING.read(name, value)
    if not isinstance(read, dict):
        raise ValueError(f"{name} must be settings such as {{schedule: linear, end: 0.0}}, got {value!r}")
    return read


OPTIMIZERS = ("adamw", "adam", "sgd", "lion")

SECTIONS: dict[str, Section] = {
    "optimizer": Section(
        "The update rule, with options of its own.",
        {
            "name": Key(one_of(*OPTIMIZERS), "adamw", "adamw, adam, sgd or lion"),
            "betas": Key(numbers, [0.9, 0.999], "of adamw, adam and lion"),
            "eps": Key(number, 1e-8, "of adamw and adam"),
            "amsgrad": Key(flag, False, "of adamw and adam"),
            "momentum": Key(number, 0.9, "of sgd"),
            "dampening": Key(number, 0.0, "of sgd"),
            "nesterov": Key(flag, False, "of sgd"),
            "bf16": Key(one_of("stochastic", "remainder", "nearest"), "stochastic",
                        "how 16-bit weights are rounded: stochastic, remainder or nearest"),
            "state_dtype": Key(one_of("float32", "bfloat16", "float16"), "float32",
                               "of the state; default: that of the weights"),
            "nonfinite": Key(one_of("propagate", "skip", "raise"), "propagate",
                             "what becomes of steps with NaN or Inf: propagate, skip or raise"),
            "capturable": Key(flag, False, "for CUDA graphs"),
            "fused": Key(flag, False, "leaves unscaling to the step under a GradScaler"),
        },
        "name",
    ),
    "weight_decay": Section(
        "Weights decay towards zero.",
        {
            "rate": Key(number, 0.01, ">= 0"),
            "kind": Key(one_of("decoupled", "l2", "independent", "cautious"), "decoupled",
                        "decoupled, l2, independent (of the learning rate) or cautious"),
            "exclude": Key(flag, True, "biases, norms and all with one dimension do not decay"),
        },
        "rate",
    ),
    "lr_decay": Section(
        "Earlier layers learn slower.",
        {"rate": Key(number, 0.9, "factor of the learning rate from each layer to the one before, in (0, 1]")},
        "rate",
    ),
    "dropout": Section(
        "Dropout by layer, role and step; a list of such sets several roles.",
        {
            "rate": Key(number, 0.1, "in [0, 1]; with layers: path, that of the last"),
            "layers": Key(either(one_of("linear", "path"), numbers), "linear",
                          "linear: base + layer * increase; path: from 0 to rate; or a list, one for each"),
            "base": Key(number, 0.1, "of the first layer"),
            "increase": Key(number, 0.02, "from layer to layer"),
            "annealing": Key(annealing, {"schedule": "linear", "start": 1.0, "end": 0.0, "steps": 1.0},
                             "changes with the step"),
            "roles": Key(names, ["hidden"],
                         "hidden, attention, activation, embedding, head, path, layerdrop, adapter"),
            "inject": Key(flag, True, "adds it behind attention and MLP of models that have none"),
            "levels": Key(whole, 7, "of annealed rates that are Python floats in the model"),
        },
        "rate",
        many=True,
    ),
    "clip": Section(
        "Gradients are clipped.",
        {
            "max_norm": Key(number, 1.0, "largest norm of all gradients together"),
            "norm_type": Key(number, 2.0, "2 or .inf"),
            "value": Key(number, 0.1, "largest absolute value of an element"),
            "adaptive": Key(number, 0.01, "largest share of the norm of the weights, by rows"),
        },
        "max_norm",
    ),
    "gradient_noise": Section(
        "Gaussian noise on gradients.",
        {
            "std": Key(number, 1e-3, "standard deviation, or a share of the gradient norm"),
            "gamma": Key(number, 0.55, "how fast it falls: std**2 / (1 + step)**gamma"),
            "relative": Key(flag, True, "whether std is a share"),
        },
        "std",
    ),
    "sam": Section(
        "Sharpness-aware minimization: a second backward pass, uphill.",
        {
            "rho": Key(number, 0.05, "radius"),
            "adaptive": Key(one_of(False, True, "weights"), False,
                            "true: in units of the weights (ASAM, a rho ten times as large); weights: but not "
                            "for biases and norms"),
            "eta": Key(number, 0.01, "of adaptive"),
            "interval": Key(whole, 1, "perturbs every so many steps"),
            "start_step": Key(duration, 0, "steps before the first, or as 0.1 a share of the run"),
            "perturb": Key(one_of("all", "norms"), "all", "all, or norms only"),
            "rounding": Key(one_of("stochastic", "nearest"), "stochastic", "of perturbed 16-bit weights"),
        },
        "rho",
    ),
    "msam": Section(
        "Sharpness-aware minimization along the momentum: one backward pass.",
        {"rho": Key(number, 0.3, "radius")},
        "rho",
    ),
    "lookahead": Section(
        "Every k steps, weights go part of the way back.",
        {
            "k": Key(whole, 5, "steps between"),
            "alpha": Key(number, 0.5, "share of the way that stays, in [0, 1]"),
            "pullback_momentum": Key(one_of("none", "reset", "pullback"), "none",
                                     "what becomes of the momentum: none, reset or pullback"),
        },
        "k",
    ),
    "ema": Section(
        "Evaluates a moving average of the weights; a list of such, with names, keeps several.",
        {
            "decay": Key(number, 0.999, "in [0, 1)"),
            "name": Key(text, "ema", "tells several apart"),
            "start": Key(duration, 0, "step of the first weights, or as 0.1 a share of the run"),
            "every": Key(whole, 1, "steps between"),
            "warmup": Key(one_of("ratio", "power"), "ratio", "how the decay grows: ratio or power"),
        },
        "decay",
        many=True,
    ),
    "swa": Section(
        "Evaluates the mean of the weights late in the run.",
        {
            "start": Key(duration, 0.75, "step of the first weights, or as 0.75 a share of the run"),
            "every": Key(whole, 1, "steps between"),
        },
        "start",
    ),
    "l1": Section("Weights are drawn to exact zeros.", {"strength": Key(number, 1e-4, ">= 0")}, "strength"),
    "l2sp": Section(
        "Weights are drawn to where they started.", {"strength": Key(number, 1e-3, ">= 0")}, "strength"
    ),
}  # fmt: skip
