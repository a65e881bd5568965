"""The contenders of `fastreg compare`: one entry in this file is all that a new one needs.

An entry is a function that edits the `Setup` of a run before training starts: the regularizers of the
optimizer, the optimizer itself, the model (dropout, hooks on its inputs), the training step (a second
backward pass), or the weights that are evaluated.  Entries combine: `clip+ema=0.99` applies both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .usage import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from .measure import Stopwatch


def fastreg_adamw(setup: Setup) -> Optimizer:
    """`fastreg.AdamW` with the regularizers of the setup, in one pass; within `fastreg.SAM` if it asks."""
    import fastreg

    settings = {
        "lr": setup.lr, "weight_decay": setup.weight_decay, "regularizers": setup.regularizers,
        "seed": setup.seed, **setup.options,
    }  # fmt: skip
    if setup.sharpness:
        return fastreg.SAM(setup.model.parameters(), fastreg.AdamW, **setup.sharpness, **settings)
    return fastreg.AdamW(setup.model.parameters(), **settings)


def torch_adamw(setup: Setup) -> Optimizer:
    """`torch.optim.AdamW` at its best setting."""
    import torch

    if setup.regularizers or setup.options or setup.sharpness:
        pieces = (type(piece).__name__ for piece in setup.regularizers)
        names = ", ".join((*pieces, *setup.options, *["SAM"] * bool(setup.sharpness)))
        raise ValueError(
            f"torch.optim.AdamW is compared as it is, got {names}; leave 'torch' out of the combination"
        )
    return torch.optim.AdamW(
        setup.model.parameters(), lr=setup.lr, weight_decay=setup.weight_decay, fused=True
    )


def training_step(loss: Callable[[], Tensor], optimizer: Optimizer, watch: Stopwatch) -> None:
    """Backward and step; what runs under `watch` counts as the optimizer's share of the step.

    Args:
        loss: Evaluates the model on the batch of this step, with gradients.
        optimizer: The setup's optimizer.
        watch: Times the optimizer.
    """
    loss().backward()
    with watch:
        optimizer.step()
    optimizer.zero_grad()


def sharpness_aware_step(loss: Callable[[], Tensor], optimizer: Any, watch: Stopwatch) -> None:
    """Two backward passes on the batch: at the weights, and where `first_step` takes them.

    Args:
        loss: As for `training_step`.
        optimizer: A `fastreg.SAM`.
        watch: Times both of its steps.
    """
    loss().backward()
    with watch:
        optimizer.first_step()
    optimizer.zero_grad()
    loss().backward()
    with watch:
        optimizer.second_step()
    optimizer.zero_grad()


def averaged(optimizer: Any) -> contextlib.AbstractContextManager[Any]:
    """Evaluates with the first there is: EMA or SWA, slow weights, the weights that MSAM perturbs."""
    return optimizer.averaged()


@dataclass
class Setup:
    """What a contender may change; everything else is the same for all."""

    model: nn.Module
    lr: float
    weight_decay: float
    seed: int
    steps: int  # of the whole run
    regularizers: list[Any] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)  # for `fastreg.AdamW`
    sharpness: dict[str, Any] = field(default_factory=dict)  # for `fastreg.SAM` around it
    optimizer: Callable[[Setup], Optimizer] = fastreg_adamw
    training_step: Callable[[Callable[[], Tensor], Optimizer, Stopwatch], None] = training_step
    schedulers: list[Any] = field(default_factory=list)  # whose `step()` follows every training step
    evaluation: Callable[[Optimizer], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True)
class Entry:
    """One ingredient: its name, what it does, its default strength if it has one, how it is applied."""

    name: str
    summary: str
    strength: float | None
    apply: Callable[..., None]


ENTRIES: dict[str, Entry] = {}
ALIASES = {"all": "clip+noise+ema+decay"}
DEFAULT = "torch,plain,clip,noise,ema,decay,all"


def contender(
    name: str, summary: str, strength: float | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function `apply(setup, strength)`, or `apply(setup)` where no strength is given.

    Args:
        name: What `--with` calls it.
        summary: What it does; `{}` stands for the strength.
        strength: Default of the one number that sets how strongly it regularizes.
    """

    def register(apply: Callable[..., None]) -> Callable[..., None]:
        ENTRIES[name] = Entry(name, summary, strength, apply)
        return apply

    return register


@contender("torch", "torch.optim.AdamW(fused=True)")
def _torch(setup: Setup) -> None:
    setup.optimizer = torch_adamw


@contender("plain", "fastreg.AdamW without regularizers: what the others are compared with")
def _plain(setup: Setup) -> None:
    pass


@contender("clip", "global gradient norm clipped to {}", 1.0)
def _clip(setup: Setup, max_norm: float) -> None:
    import fastreg

    setup.regularizers.append(fastreg.ClipNorm(max_norm))


@contender("value", "every gradient element clipped to {}", 0.01)
def _value(setup: Setup, clip_value: float) -> None:
    import fastreg

    setup.regularizers.append(fastreg.ClipValue(clip_value))


@contender("adaptive", "gradients of rows clipped to {} times the norm of their weights", 0.01)
def _adaptive(setup: Setup, clipping: float) -> None:
    import fastreg

    setup.regularizers.append(fastreg.AdaptiveClip(clipping))


@contender("noise", "Gaussian noise of standard deviation {} on every gradient element", 3e-3)
def _noise(setup: Setup, std: float) -> None:
    import fastreg

    setup.regularizers.append(fastreg.GradientNoise(std))


@contender("anneal", "Gaussian noise of {} times the gradient norm at first, annealed with gamma 0.55", 0.3)
def _anneal(setup: Setup, std: float) -> None:
    import fastreg

    setup.regularizers.append(fastreg.GradientNoise(std, gamma=0.55, relative=True))


@contender("ema", "evaluates a moving average of the weights with decay {}", 0.98)
def _ema(setup: Setup, decay: float) -> None:
    import fastreg

    setup.regularizers.append(fastreg.EMA(decay))
    setup.evaluation = averaged


@contender("swa", "evaluates the mean of the weights from step {} on", 150)
def _swa(setup: Setup, start: float) -> None:
    import fastreg

    setup.regularizers.append(fastreg.SWA(start))  # type: ignore[arg-type]  # refuses what is not whole
    setup.evaluation = averaged


@contender("lookahead", "goes half the way back every {} steps, and evaluates where it went", 5)
def _lookahead(setup: Setup, k: float) -> None:
    import fastreg

    setup.regularizers.append(fastreg.SlowWeights(k))  # type: ignore[arg-type]
    setup.evaluation = averaged


@contender(
    "sam", "sharpness-aware: steps by the gradient at distance {} uphill, with a second backward pass", 0.05
)
def _sam(setup: Setup, rho: float) -> None:
    setup.sharpness, setup.training_step = {"rho": rho}, sharpness_aware_step


@contender("asam", "like sam, at distance {} in units of the weights", 0.5)
def _asam(setup: Setup, rho: float) -> None:
    setup.sharpness, setup.training_step = {"rho": rho, "adaptive": True, "eta": 0.01}, sharpness_aware_step


@contender("msam", "steps by the gradient at distance {} against the momentum; one backward pass", 0.3)
def _msam(setup: Setup, rho: float) -> None:
    import fastreg

    setup.regularizers.append(fastreg.MSAM(rho))
    setup.evaluation = averaged  # parameters hold perturbed weights while training


@contender("decay", "decoupled weight decay {}", 0.5)
def _decay(setup: Setup, weight_decay: float) -> None:
    setup.weight_decay = weight_decay


@contender("cautious", "weight decay {} where the update shrinks the weight as well", 0.5)
def _cautious(setup: Setup, weight_decay: float) -> None:
    setup.weight_decay, setup.options["decay"] = weight_decay, "cautious"


@contender("independent", "weight decay {} that follows the schedule of the learning rate alone", 1e-3)
def _independent(setup: Setup, weight_decay: float) -> None:
    setup.weight_decay, setup.options["decay"] = weight_decay, "independent"


@contender("amsgrad", "AMSGrad: divides by the largest second moment so far")
def _amsgrad(setup: Setup) -> None:
    setup.options["amsgrad"] = True


@contender("l1", "L1 penalty {}, proximal", 0.1)
def _l1(setup: Setup, strength: float) -> None:
    import fastreg

    setup.regularizers.append(fastreg.L1(strength))


@contender("l2sp", "pulled towards the starting point with strength {}", 1e-3)
def _l2sp(setup: Setup, strength: float) -> None:
    import fastreg

    setup.regularizers.append(fastreg.L2SP(strength))


@contender("dropout", "dropout {} behind attention and MLP of every layer", 0.1)
def _dropout(setup: Setup, p: float) -> None:
    from fastreg.layerwise import set_dropout

    set_dropout(setup.model, p, inject=True)


@contender("layerwise", "dropout that grows over the layers from 0 to {}", 0.2)
def _layerwise(setup: Setup, p: float) -> None:
    from fastreg.layerwise import set_dropout
    from fastreg.schedules import DropPathLayers

    set_dropout(setup.model, DropPathLayers(p), inject=True)


@contender("annealed", "dropout {} at first, which falls to 0 over the run", 0.2)
def _annealed(setup: Setup, p: float) -> None:
    from fastreg.layerwise import DropoutScheduler
    from fastreg.schedules import Linear

    schedule = Linear(p, end=0.0, steps=setup.steps)
    setup.schedulers.append(DropoutScheduler(setup.model, schedule, inject=True))


@contender("adadrop", "dropout {} on average, more of neurons that matter less", 0.1)
def _adadrop(setup: Setup, p: float) -> None:
    from fastreg.nn import AdaptiveDropout

    model: Any = setup.model
    _in_place_of_dropout(setup, p, lambda rate: AdaptiveDropout(model.config.hidden_size, rate))


@contender("droppath", "leaves out residual branches, at rates that grow over the layers from 0 to {}", 0.2)
def _droppath(setup: Setup, p: float) -> None:
    from fastreg.nn import DropPath
    from fastreg.schedules import DropPathLayers

    _in_place_of_dropout(setup, DropPathLayers(p), DropPath)


def _in_place_of_dropout(setup: Setup, rates: Any, make: Callable[[float], nn.Module]) -> None:
    """Put other modules where a model has dropout behind attention and MLP."""
    from fastreg.layerwise import set_dropout
    from fastreg.nn.replace import replace

    model: Any = setup.model
    for row in set_dropout(model, rates):
        if row.how != "module":
            raise ValueError(f"{row.path} of {type(model).__name__} is no module that could be replaced")
        replace(model, model.get_submodule(row.path), make(row.rate))


@dataclass(frozen=True)
class Contender:
    """A combination of entries, as asked for by `--with`."""

    label: str
    parts: tuple[tuple[Entry, float | None], ...]

    @property
    def summary(self) -> str:
        """What it does, with its strengths."""
        return "; ".join(
            entry.summary.format(f"{strength:g}" if strength is not None else "")
            for entry, strength in self.parts
        )

    def apply(self, setup: Setup) -> None:
        """Edit the setup."""
        for entry, strength in self.parts:
            entry.apply(*((setup,) if strength is None else (setup, strength)))


def parse(text: str) -> list[Contender]:
    """Contenders from `NAME[=STRENGTH][+NAME...],...`.

    Args:
        text: Such as `"plain,ema,clip=0.5+noise=1e-3"`.

    Raises:
        UsageError: For unknown names, numbers that are none, and doublets.
    """
    labels = [label.strip() for label in text.split(",") if label.strip()]
    if not labels:
        raise UsageError(f"--with names no contender, got {text!r}; for example --with plain,ema")
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"--with names {label!r} twice; give each contender once")
    return [Contender(label, tuple(map(_part, _expanded(label).split("+")))) for label in labels]


def _expanded(label: str) -> str:
    return "+".join(ALIASES.get(name, name) for name in map(str.strip, label.split("+")))


def _part(text: str) -> tuple[Entry, float | None]:
    name, given, value = (word.strip() for word in text.partition("="))
    if name not in ENTRIES:
        known = ", ".join((*ENTRIES, *ALIASES))
        raise UsageError(f"--with: unknown contender {name!r}; choose from {known}")
    entry = ENTRIES[name]
    if not given:
        return entry, entry.strength
    if entry.strength is None:
        raise UsageError(f"--with: {name!r} takes no strength, got {text!r}")
    try:
        return entry, float(value)
    except ValueError:
        raise UsageError(
            f"--with: the strength in {text!r} is not a number; for example {name}={entry.strength:g}"
        ) from None


def listing() -> str:
    """All contenders and what they do, one a line."""
    lines = [
        (entry.name, Contender(entry.name, ((entry, entry.strength),)).summary) for entry in ENTRIES.values()
    ]
    lines += ALIASES.items()
    return "\n".join(f"{name:<12}{summary}" for name, summary in lines)
