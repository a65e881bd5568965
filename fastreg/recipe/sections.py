"""The sections of a recipe, in one table: what each makes, from which its settings follow.

The settings of a section are the parameters of its factory: their names, types and defaults are those of the
signature, their help that of the docstring.
"""

import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import nn as fastreg_nn
from .. import optim
from ..adversarial import FGM
from ..common.validation import check_known
from ..optim.registry import OPTIMIZERS
from . import factories
from .model_callbacks import RDropCallback
from .readers import Reader, SettingError, duration, either, flag, one_of, reader_of

NOT_SETTINGS = frozenset(
    {
        "self", "params", "model", "lr", "seed", "regularizers", "base_optimizer", "buffers", "towards",
        "weight_decay", "maximize", "foreach", "differentiable", "decoupled_weight_decay",
        "closure", "sync_perturbation", "generator", "error_if_nonfinite", "kwargs",
    }
)  # fmt: skip
"""Parameters that are no data, or that other sections and `apply` set."""


@dataclass(frozen=True)
class Key:
    """One setting of a section, with its help."""

    read: Reader
    example: Any  # the default, as YAML holds it
    text: str


@dataclass(frozen=True)
class Section:
    """One regularizer, as a recipe has it: on, with settings, or off."""

    text: str
    factory: Callable[..., Any]  # its parameters are the settings, the first of which a bare value stands for
    others: Sequence[Callable[..., Any]] = ()  # further callables whose parameters are settings
    many: bool = False  # whether a recipe may have a list of it
    first: dict[str, Key] = field(default_factory=dict)  # settings before those of the factory
    last: dict[str, Key] = field(default_factory=dict)  # settings that it lacks, or that take other values
    annealed: bool = False  # whether the level may change with the step
    omitted: Sequence[str] = ()  # parameters that are no settings
    printed: Mapping[str, Any] = field(default_factory=dict)  # defaults that depend on other settings
    durations: Sequence[str] = ()  # settings in steps, which may be shares of the run
    needs_model: Sequence[str] = ()  # settings that only a model can check

    @functools.cached_property
    def keys(self) -> dict[str, Key]:
        """The settings of the section, by name."""
        keys = dict(self.first)
        for factory in (self.factory, *self.others):
            hints, helps = _hints(factory), _helps(factory)
            for name, parameter in inspect.signature(factory).parameters.items():
                if name in NOT_SETTINGS or name in self.omitted:
                    continue
                reader, text = reader_of(hints.get(name)), helps.get(name, "")
                if name in self.durations:
                    reader, text = duration, f"{text}; or a share of the run, such as 0.5"
                if reader is not None and name not in keys:
                    default = self.printed.get(name, parameter.default)
                    keys[name] = Key(reader, list(default) if isinstance(default, tuple) else default, text)
        return keys | self.last | ({"annealing": _ANNEALING_KEY} if self.annealed else {})

    @property
    def short(self) -> str:
        """The setting that a bare value stands for."""
        return next(iter(self.keys))

    def read(self, name: str, value: Any) -> dict[str, Any] | list[dict[str, Any]] | None:
        """Returns the settings in their own types; `None` where the section is off.

        The value is that of `regularization.Setting`, or `False` for off; errors begin with the name.
        """
        if value is None or value is False:
            return None
        if value is True:
            return {}
        if isinstance(value, Mapping):
            check_known(f"{name}: unknown setting", value, self.keys)
            items = {key: item for key, item in value.items() if item is not None}
            return {key: self.keys[key].read(f"{name}.{key}", item) for key, item in items.items()}
        if self.many and isinstance(value, Sequence) and any(isinstance(item, Mapping) for item in value):
            return [self.read_one(f"{name}[{i}]", item) for i, item in enumerate(value)]
        return {self.short: self.keys[self.short].read(name, value)}

    def read_one(self, name: str, value: Any) -> dict[str, Any]:
        """Returns the settings of a section that is part of another one or of a list, and on."""
        settings = self.read(name, value)
        if not isinstance(settings, dict):
            raise ValueError(
                f"{name} must be settings by name, or true for the defaults, got {value!r}; "
                "to switch it off, leave it out"
            )
        return settings

    def make(
        self, where: str, settings: Mapping[str, Any], steps: int | None, *args: Any, **more: Any
    ) -> Any:
        """Calls the factory with `args`, the settings as `read` returns them, and `more`.

        Errors begin with `where`; `steps` are those of the whole run.
        """
        arguments = {key: tuple(item) if isinstance(item, list) else item for key, item in settings.items()}
        for key in self.durations:
            value = settings.get(key, self.keys[key].example)
            arguments[key] = resolve_duration(f"{where}.{key}", value, steps)
        if "annealing" in settings:
            arguments["annealing"] = ANNEALING.make(f"{where}.annealing", settings["annealing"], steps)
        return call(where, self.factory, *args, **arguments, **more)


def call(where: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function; errors begin with the name of the section, and of the setting where it is known."""
    try:
        return function(*args, **kwargs)
    except SettingError as error:
        raise ValueError(f"{where}.{error}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from error


def resolve_duration(where: str, value: float, steps: int | None) -> int:
    """Returns a duration in steps; refuses a share of a run of unknown length."""
    if isinstance(value, int):
        return value
    if steps is None:
        raise ValueError(f"{where} is {value:g} of the run: give apply() the number of its steps=")
    return round(value * steps)


def _hints(factory: Any) -> dict[str, Any]:
    """Returns the annotated types of the parameters of a function or class."""
    factory = getattr(factory, "func", factory)
    as_class = isinstance(factory, type) and not hasattr(factory, "_fields")
    return typing.get_type_hints(factory.__init__ if as_class else factory)


def _helps(factory: Any) -> dict[str, str]:
    """Returns the first sentence on each parameter in the docstring of a function or class."""
    doc = inspect.getdoc(getattr(factory, "func", factory)) or ""
    arguments = re.search(r"^Args:\n((?:    .*\n?|\n)*)", doc, re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments[1] if arguments else "", re.MULTILINE)
    sentences = {name: re.split(r"(?<=\.)\s(?=[A-Z])", " ".join(entry.split()))[0] for name, entry in entries}
    return {name: _as_yaml(sentence.rstrip(".")) for name, sentence in sentences.items()}


def _as_yaml(sentence: str) -> str:
    """Returns a sentence with constants as YAML writes them, and without quotes."""
    constants = {"None": "null", "True": "true", "False": "false"}
    return re.sub(r"[`\"]|\b(None|True|False)\b", lambda match: constants.get(match[0], ""), sentence)


ANNEALING = Section(
    "How a value changes with the step.", factories.annealing, printed={"end": 0.0}, durations=("steps",)
)


_ANNEALING_KEY = Key(
    ANNEALING.read_one, None,
    "Factor that changes with the step, such as {schedule: cosine, start: 1.0, end: 0.1, steps: 0.5}",
)  # fmt: skip

SECTIONS: dict[str, Section] = {
    "optimizer": Section(
        "The update rule, with its options.", optim.Adam,
        [entry.optimizer for entry in OPTIMIZERS.values()],
        first={"name": Key(one_of(*OPTIMIZERS), "adamw", ", ".join(OPTIMIZERS))}, omitted=("decay",),
    ),
    "weight_decay": Section("Weights decay towards zero.", factories.WeightDecay),
    "lr_decay": Section("Earlier layers learn slower.", factories.LayerDecay),
    "dropout": Section(
        "Dropout by layer, role and step; a list of such sets several roles.", factories.dropout, many=True,
        annealed=True, printed={"rate": 0.1, "base": 0.1, "increase": 0.0, "levels": 7},
    ),
    "clip": Section("Gradients are clipped.", factories.clip, printed={"max_norm": 1.0, "norm_type": 2.0}),
    "gradient_noise": Section(
        "Gaussian noise on gradients.", functools.partial(optim.GradientNoise, std=1e-3)
    ),
    "embedding_noise": Section(
        "Noise on token embeddings (NEFTune).", fastreg_nn.attach_embedding_noise, annealed=True,
    ),
    "activation_noise": Section(
        "Gaussian noise on activations.", factories.activation_noise, annealed=True, needs_model=("pattern",)
    ),
    "token_noise": Section(
        "Input tokens are replaced by random ones; labels stay.", fastreg_nn.attach_token_noise,
        annealed=True, needs_model=("special_tokens",),
    ),
    "weight_noise": Section(
        "Gaussian noise on weights while gradients are computed.",
        functools.partial(optim.WeightNoise, std=0.01), annealed=True,
    ),
    "adversarial": Section(
        "A second pass with embeddings moved to raise the loss.", FGM, needs_model=("modules",),
        first={"method": Key(one_of("fgm"), "fgm", "fgm, the fast gradient method")},
    ),
    "r_drop": Section("Two passes with different dropout that should agree.", RDropCallback),
    "sam": Section(
        "Sharpness-aware minimization: a second backward pass, uphill.", optim.SAM,
        last={
            "adaptive": Key(either(flag, one_of("weights")), False,
                            "true: in units of the weights (ASAM; needs a larger rho); weights: no biases"),
            "perturb": Key(one_of("all", "norms"), "all", "all, or norms only"),
        },
        durations=("start_step",),
    ),
    "msam": Section("Sharpness-aware minimization along the momentum: one backward pass.", optim.MSAM),
    "lookahead": Section(
        "Every k steps, weights go part of the way back.", optim.SlowWeights, omitted=("name",)
    ),
    "ema": Section(
        "Evaluates a moving average of the weights; a list of such, with names, keeps several.", optim.EMA,
        many=True, durations=("start",),
    ),
    "swa": Section(
        "Evaluates the mean of the weights late in the run.", optim.SWA, durations=("start",),
        printed={"start": 0.75}, omitted=("name",),
    ),
    "l1": Section("Weights are drawn to exact zeros.", functools.partial(optim.L1, strength=1e-4)),
    "l2sp": Section("Weights are drawn to where they started.", functools.partial(optim.L2SP, strength=1e-3)),
}  # fmt: skip
