"""The table of contenders: a new one is a row.

A row names the fields of a `fastreg.Regularization` that turn it on. What no recipe can say edits the `Setup`
of a run. Rows combine: `clip+ema=0.99` applies both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...nn import AdaptiveDropout, DropPath
from ...optim.registry import OPTIMIZERS
from ...schedules import DropPathLayers
from .setup import Setup, replace_dropout

Fields = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A row of the table: one ingredient of contenders, as `--with` names it."""

    name: str
    summary: str  # in which `{}` stands for the strength
    strength: float | None = None  # default of the one number that says how strongly it regularizes
    fields: Callable[[Any], Fields] = lambda strength: {}  # of a `fastreg.Regularization`
    edit: Callable[[Setup, Any], None] = lambda setup, strength: None  # where a recipe cannot say it
    write: Callable[[float], str] = "{:g}".format  # how the summary shows a strength

    def apply(self, setup: Setup, strength: float | None) -> None:
        """Adds this ingredient to a setup, see `Setup.add`."""
        setup.add(**self.fields(strength))
        self.edit(setup, strength)

    def describe(self, strength: float | None) -> str:
        """Returns what it does at a strength."""
        return self.summary if strength is None else self.summary.format(self.write(strength))


def _moment(start: float) -> str:
    return f"{start:.3g} of the run" if start < 1 else f"step {start:g}"


def _step_or_share(start: float) -> float:
    return int(start) if start >= 1 and start.is_integer() else start


def _use_torch(setup: Setup, _: None) -> None:
    setup.torch_adamw = True


def _make_private(setup: Setup, noise_multiplier: float) -> None:
    if setup.noise_multiplier is not None:
        raise ValueError(
            f"dp is given more than once, as {setup.noise_multiplier:g} and {noise_multiplier:g}"
        )
    setup.noise_multiplier = noise_multiplier


def _drop_path(setup: Setup, rate: float) -> None:
    replace_dropout(setup.model, DropPathLayers(rate), DropPath)


def _adaptive_dropout(setup: Setup, rate: float) -> None:
    width = setup.model.config.hidden_size
    replace_dropout(setup.model, rate, lambda p: AdaptiveDropout(width, p))


def _optimizer(name: str) -> Entry:
    summary = f"fastreg.{OPTIMIZERS[name].optimizer.__name__} in place of AdamW, at the same learning rate"
    return Entry(name, summary, fields=lambda _: {"optimizer": {"name": name}})


_TABLE = (
    Entry("torch", "torch.optim.AdamW(fused=True)", edit=_use_torch),
    Entry("plain", "fastreg.AdamW without regularizers: what the others are compared with"),
    Entry("clip", "global gradient norm clipped to {}", 1.0, lambda x: {"clip": {"max_norm": x}}),
    Entry("value", "every gradient element clipped to {}", 0.01, lambda x: {"clip": {"value": x}}),
    Entry("adaptive", "gradients of rows clipped to {} times the norm of their weights",
          0.01, lambda x: {"clip": {"adaptive": x}}),
    Entry("noise", "Gaussian noise of standard deviation {} on every gradient element",
          3e-3, lambda x: {"gradient_noise": {"std": x}}),
    Entry("anneal", "Gaussian noise of {} times the gradient norm at first, annealed with gamma 0.55",
          0.3, lambda x: {"gradient_noise": {"std": x, "gamma": 0.55, "relative": True}}),
    Entry("ema", "evaluates a moving average of the weights with decay {}",
          0.98, lambda x: {"ema": {"decay": x}}),
    Entry("swa", "evaluates the mean of the weights from {} on",
          0.3, lambda x: {"swa": {"start": _step_or_share(x)}}, write=_moment),
    Entry("lookahead", "goes half the way back every {} steps, and evaluates where it went",
          5, lambda x: {"lookahead": {"k": x}}),
    Entry("sam", "sharpness-aware: steps by the gradient at distance {} uphill, with a second backward pass",
          0.05, lambda x: {"sam": {"rho": x}}),
    Entry("asam", "like sam, at distance {} in units of the weights",
          0.5, lambda x: {"sam": {"rho": x, "adaptive": True, "eta": 0.01}}),
    Entry("msam", "steps by the gradient at distance {} against the momentum; one backward pass",
          0.3, lambda x: {"msam": {"rho": x}}),
    Entry("decay", "decoupled weight decay {}", 0.5, lambda x: {"weight_decay": {"rate": x}}),
    Entry("cautious", "weight decay {} where the update shrinks the weight as well",
          0.5, lambda x: {"weight_decay": {"rate": x, "kind": "cautious"}}),
    Entry("independent", "weight decay {} that follows the schedule of the learning rate alone",
          1e-3, lambda x: {"weight_decay": {"rate": x, "kind": "independent"}}),
    *(_optimizer(name) for name in OPTIMIZERS if name != "adamw"),
    Entry("amsgrad", "AMSGrad: divides by the largest second moment so far",
          fields=lambda _: {"optimizer": {"amsgrad": True}}),
    Entry("l1", "L1 penalty {}, proximal", 0.1, lambda x: {"l1": {"strength": x}}),
    Entry("l2sp", "pulled towards the starting point with strength {}",
          1e-3, lambda x: {"l2sp": {"strength": x}}),
    Entry("dropout", "dropout {} behind attention and MLP of every layer",
          0.1, lambda x: {"dropout": {"rate": x, "inject": True}}),
    Entry("layerwise", "dropout that grows over the layers from 0 to {}",
          0.2, lambda x: {"dropout": {"layers": "path", "rate": x, "inject": True}}),
    Entry("annealed", "dropout {} at first, which falls to 0 over the run",
          0.2, lambda x: {"dropout": {"annealing": {"start": x, "end": 0.0, "steps": 1.0}, "inject": True}}),
    Entry("neftune", "uniform noise of size {} on token embeddings",
          5.0, lambda x: {"embedding_noise": {"alpha": x}}),
    Entry("tokennoise", "a share of {} of the input tokens replaced by random ones",
          0.1, lambda x: {"token_noise": {"rate": x}}),
    Entry("actnoise", "Gaussian noise of {} times each output of attention and MLP",
          0.2, lambda x: {"activation_noise": {"std": x, "kind": "multiplicative"}}),
    Entry("weightnoise", "Gaussian noise of {} on all weights while gradients are computed",
          0.01, lambda x: {"weight_noise": {"std": x}}),
    Entry("fgm", "a second backward pass with embeddings moved by {} to raise the loss",
          1.0, lambda x: {"adversarial": {"method": "fgm", "epsilon": x}}),
    Entry("rdrop", "two passes with different dropout of 0.1, whose divergence counts {} times",
          1.0, lambda x: {"r_drop": {"alpha": x}, "dropout": {"rate": 0.1, "inject": True}}),
    Entry("dp", "differentially private: gradients of samples clipped to 1, noise multiplier {}",
          0.5, edit=_make_private),
    Entry("adadrop", "dropout {} on average, more of neurons that matter less", 0.1, edit=_adaptive_dropout),
    Entry("droppath", "leaves out residual branches, at rates that grow over the layers from 0 to {}",
          0.2, edit=_drop_path),
)  # fmt: skip

ENTRIES = {entry.name: entry for entry in _TABLE}
ALIASES = {"all": "clip+noise+ema+decay"}
DEFAULT = "torch,plain,clip,noise,ema,decay,all"
