"""The contenders of `fastreg compare`: one entry in this file is all that a new one needs.

An entry is a function that edits the `Setup` of a run before training starts: mostly it adds settings of a
`fastreg.Regularization`, or else it edits the model, or makes the optimizer itself.  Entries combine:
`clip+ema=0.99` applies both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .setup import Setup, torch_adamw
from .usage import require

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Entry:
    """One ingredient: its name, what it does, its default strength if it has one, how it is applied."""

    name: str
    summary: str
    strength: float | None
    apply: Callable[..., None]
    told: Callable[[float], str] = "{:g}".format

    def described(self, strength: float | None) -> str:
        """What it does, with this strength."""
        return self.summary if strength is None else self.summary.format(self.told(strength))


ENTRIES: dict[str, Entry] = {}
ALIASES = {"all": "clip+noise+ema+decay"}
DEFAULT = "torch,plain,clip,noise,ema,decay,all"


def contender(
    name: str, summary: str, strength: float | None = None, told: Callable[[float], str] = "{:g}".format
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function `apply(setup, strength)`, or `apply(setup)` where no strength is given.

    Args:
        name: What `--with` calls it.
        summary: What it does; `{}` stands for the strength.
        strength: Default of the one number that sets how strongly it regularizes.
        told: How the summary says it.
    """

    def register(apply: Callable[..., None]) -> Callable[..., None]:
        ENTRIES[name] = Entry(name, summary, strength, apply, told)
        return apply

    return register


@contender("torch", "torch.optim.AdamW(fused=True)")
def _torch(setup: Setup) -> None:
    setup.make = torch_adamw


@contender("plain", "fastreg.AdamW without regularizers: what the others are compared with")
def _plain(setup: Setup) -> None:
    pass


@contender("clip", "global gradient norm clipped to {}", 1.0)
def _clip(setup: Setup, max_norm: float) -> None:
    setup.add(clip={"max_norm": max_norm})


@contender("value", "every gradient element clipped to {}", 0.01)
def _value(setup: Setup, clip_value: float) -> None:
    setup.add(clip={"value": clip_value})


@contender("adaptive", "gradients of rows clipped to {} times the norm of their weights", 0.01)
def _adaptive(setup: Setup, clipping: float) -> None:
    setup.add(clip={"adaptive": clipping})


@contender("noise", "Gaussian noise of standard deviation {} on every gradient element", 3e-3)
def _noise(setup: Setup, std: float) -> None:
    setup.add(gradient_noise={"std": std})


@contender("anneal", "Gaussian noise of {} times the gradient norm at first, annealed with gamma 0.55", 0.3)
def _anneal(setup: Setup, std: float) -> None:
    setup.add(gradient_noise={"std": std, "gamma": 0.55, "relative": True})


@contender("ema", "evaluates a moving average of the weights with decay {}", 0.98)
def _ema(setup: Setup, decay: float) -> None:
    setup.add(ema={"decay": decay})


def _moment(start: float) -> str:
    return f"{start:.3g} of the run" if start < 1 else f"step {start:g}"


@contender("swa", "evaluates the mean of the weights from {} on", 0.3, _moment)
def _swa(setup: Setup, start: float) -> None:
    setup.add(swa={"start": int(start) if start >= 1 and start.is_integer() else start})


@contender("lookahead", "goes half the way back every {} steps, and evaluates where it went", 5)
def _lookahead(setup: Setup, k: float) -> None:
    setup.add(lookahead={"k": k})


@contender(
    "sam", "sharpness-aware: steps by the gradient at distance {} uphill, with a second backward pass", 0.05
)
def _sam(setup: Setup, rho: float) -> None:
    setup.add(sam={"rho": rho})


@contender("asam", "like sam, at distance {} in units of the weights", 0.5)
def _asam(setup: Setup, rho: float) -> None:
    setup.add(sam={"rho": rho, "adaptive": True, "eta": 0.01})


@contender("msam", "steps by the gradient at distance {} against the momentum; one backward pass", 0.3)
def _msam(setup: Setup, rho: float) -> None:
    setup.add(msam={"rho": rho})


@contender("decay", "decoupled weight decay {}", 0.5)
def _decay(setup: Setup, rate: float) -> None:
    setup.add(weight_decay={"rate": rate})


@contender("cautious", "weight decay {} where the update shrinks the weight as well", 0.5)
def _cautious(setup: Setup, rate: float) -> None:
    setup.add(weight_decay={"rate": rate, "kind": "cautious"})


@contender("independent", "weight decay {} that follows the schedule of the learning rate alone", 1e-3)
def _independent(setup: Setup, rate: float) -> None:
    setup.add(weight_decay={"rate": rate, "kind": "independent"})


@contender("amsgrad", "AMSGrad: divides by the largest second moment so far")
def _amsgrad(setup: Setup) -> None:
    setup.add(optimizer={"amsgrad": True})


@contender("l1", "L1 penalty {}, proximal", 0.1)
def _l1(setup: Setup, strength: float) -> None:
    setup.add(l1={"strength": strength})


@contender("l2sp", "pulled towards the starting point with strength {}", 1e-3)
def _l2sp(setup: Setup, strength: float) -> None:
    setup.add(l2sp={"strength": strength})


@contender("dropout", "dropout {} behind attention and MLP of every layer", 0.1)
def _dropout(setup: Setup, p: float) -> None:
    setup.add(dropout={"rate": p, "inject": True})


@contender("layerwise", "dropout that grows over the layers from 0 to {}", 0.2)
def _layerwise(setup: Setup, p: float) -> None:
    setup.add(dropout={"layers": "path", "rate": p, "inject": True})


@contender("annealed", "dropout {} at first, which falls to 0 over the run", 0.2)
def _annealed(setup: Setup, p: float) -> None:
    setup.add(dropout={"annealing": {"start": p, "end": 0.0, "steps": 1.0}, "inject": True})


@contender("neftune", "uniform noise of size {} on token embeddings", 5.0)
def _neftune(setup: Setup, alpha: float) -> None:
    setup.add(embedding_noise={"alpha": alpha})


@contender("tokennoise", "a share of {} of the input tokens replaced by random ones", 0.1)
def _tokennoise(setup: Setup, rate: float) -> None:
    setup.add(token_noise={"rate": rate})


@contender("actnoise", "Gaussian noise of {} times each output of attention and MLP", 0.2)
def _actnoise(setup: Setup, std: float) -> None:
    setup.add(activation_noise={"std": std, "kind": "multiplicative"})


@contender("weightnoise", "Gaussian noise of {} on all weights while gradients are computed", 0.01)
def _weightnoise(setup: Setup, std: float) -> None:
    setup.add(weight_noise={"std": std})


@contender("fgm", "a second backward pass with embeddings moved by {} to raise the loss", 1.0)
def _fgm(setup: Setup, epsilon: float) -> None:
    setup.add(adversarial={"method": "fgm", "epsilon": epsilon})


@contender("rdrop", "two passes with different dropout of 0.1, whose divergence counts {} times", 1.0)
def _rdrop(setup: Setup, alpha: float) -> None:
    setup.add(r_drop={"alpha": alpha}, dropout={"rate": 0.1, "inject": True})


@contender("dp", "differentially private: gradients of samples clipped to 1, noise multiplier {}", 0.5)
def _dp(setup: Setup, noise_multiplier: float) -> None:
    setup.make = partial(_private, setup.make, noise_multiplier)


def _private(make: Any, noise_multiplier: float, setup: Setup) -> Any:
    """The optimizer that would be made otherwise, inside `fastreg.DPOptimizer`."""
    import warnings

    from fastreg import DPOptimizer

    require("compare --with dp", "privacy", "opacus")
    if several := [name for name in ("adversarial", "r_drop") if name in setup.fields]:
        raise ValueError(f"{several[0]} makes several passes over a sample, whose gradients add up unclipped")
    optimizer, callbacks = make(setup)
    with warnings.catch_warnings():  # runs are to be repeated; whoever has the seed has the text as well
        warnings.filterwarnings("ignore", message="noise_seed")
        private = DPOptimizer(
            optimizer, model=setup.model, noise_multiplier=noise_multiplier, max_grad_norm=1.0,
            expected_batch_size=setup.batch_size, accountant="rdp",
            sample_rate=min(1.0, setup.batch_size / setup.windows), noise_seed=setup.seed, reproducible=True,
        )  # fmt: skip
    return private, callbacks


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
