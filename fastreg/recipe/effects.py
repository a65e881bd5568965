"""What a recipe does to a model and to the passes over it, each as a callback."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import layerwise
from .. import nn as ours
from ..layerwise.apply import remembered
from ..layerwise.inject import branches
from ..layerwise.knobs import places, unwrapped
from ..losses.r_drop import divergence, shifts
from ..nn.embedding_noise import input_embeddings
from .callbacks import Callback, Evaluate, Gradients, Passes, Watch

Times = Callable[[int], float]
"""A factor as a function of the step."""


class DropoutRates(Callback):
    """Dropout rates that are set, and those that change with the step.

    Args:
        model: The model, which stays as it was where an error is raised.
        sections: Arguments of `layerwise.DropoutScheduler`, or of `set_dropout` where there is no schedule.
    """

    name = "dropout"

    def __init__(self, model: nn.Module, sections: list[dict[str, Any]]) -> None:
        self._undo = remembered(model)
        self._schedulers: list[layerwise.DropoutScheduler] = []
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
        undo, self._undo = self._undo, lambda: None
        undo()


class Noise(Callback):
    """Noise that is attached to a model, whose level may change with the step.

    Args:
        name: See `Callback`.
        attached: What attaching it returned.
        factor: Of its level.
    """

    def __init__(self, name: str, attached: Any, factor: Times | None = None) -> None:
        self.name, self._attached = name, attached
        self._scheduler = None if factor is None else ours.NoiseScheduler(attached, factor)

    def step(self, step: int | None = None) -> None:
        """Set the level of the next step."""
        if self._scheduler is not None:
            self._scheduler.step(step)

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {} if self._scheduler is None else self._scheduler.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set the level of the step that was saved."""
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state_dict)

    def remove(self) -> None:
        """Take the noise away."""
        self._scheduler = None
        self._attached.remove()


class AttachedTokenNoise:
    """Token noise on the ids that the input embeddings of a model see; its labels stay.

    Args:
        model: A model with `get_input_embeddings()`.
        rate: See `nn.TokenNoise`.
        special_tokens: Likewise; by default those that the configuration names, such as `pad_token_id`.

    Raises:
        TypeError: If the model does not tell its embeddings.
        ValueError: For values out of range.
    """

    def __init__(self, model: nn.Module, rate: float, special_tokens: list[int] | None = None) -> None:
        embedding: Any = input_embeddings(model)
        if special_tokens is None:
            config: Any = getattr(unwrapped(model), "config", None)
            named = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
            ids = [i for given in named for i in (given if isinstance(given, list) else [given])]
            special_tokens = sorted({i for i in ids if i is not None and 0 <= i < embedding.num_embeddings})
        self._noise = ours.TokenNoise(rate, embedding.num_embeddings, special_tokens)
        self._noise.to(embedding.weight.device)
        self._hook = embedding.register_forward_pre_hook(self._replace)

    @property
    def rate(self) -> float:
        """Share of tokens that are replaced; may be set between steps."""
        return self._noise.rate

    @rate.setter
    def rate(self, value: float) -> None:
        self._noise.rate = value

    def remove(self) -> None:
        """Take it away."""
        self._hook.remove()
        self.rate = 0.0  # code that was compiled before keeps the hook

    def _replace(self, embedding: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (self._noise(args[0]), *args[1:]) if embedding.training else None


def behind_branches(model: nn.Module) -> re.Pattern[str]:
    """What matches attention and MLP of every block.

    Raises:
        ValueError: If there are none.
    """
    inner = unwrapped(model)
    names = [f"{block}.{name}" for block in places(inner) for name in branches(inner.get_submodule(block))]
    if not names:
        raise ValueError(
            f"found no attention or MLP in repeated layers of {type(inner).__name__}: give a pattern of "
            "names of modules"
        )
    # A wrapped model has the same modules under longer names.
    return re.compile(r"(.*\.)?(" + "|".join(map(re.escape, names)) + ")")


class NoisyWeights(Passes):
    """Every pass is made with noise on the weights.

    Args:
        noise: A `fastreg.WeightNoise`.
        factor: Of its standard deviation, as a function of the step.
    """

    def __init__(self, noise: Any, factor: Times | None = None) -> None:
        super().__init__("weight_noise")
        self._noise, self._levels = noise, Noise(self.name, noise, factor)

    def around_gradients(self, gradients: Gradients, watch: Watch) -> Gradients:
        """Noise for the length of a pass."""

        def noisy() -> Tensor:
            self._made = True
            with watch:
                self._noise.perturb()
            try:
                return gradients()
            finally:
                with watch:
                    self._noise.restore()

        return noisy

    def step(self, step: int | None = None) -> None:
        """Set the level of the next step."""
        super().step(step)
        self._levels.step(step)

    def state_dict(self) -> dict[str, Any]:
        """Seed and count of the noise, and the step."""
        return {"noise": self._noise.state_dict(), "levels": self._levels.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the same noise."""
        self._noise.load_state_dict(state_dict["noise"])
        self._levels.load_state_dict(state_dict["levels"])

    def remove(self) -> None:
        """The weights are themselves between passes."""


class Adversarial(Passes):
    """A second pass with embeddings moved to raise the loss, whose gradients are added.

    Args:
        attack: A `fastreg.adversarial.FGM`.
    """

    def __init__(self, attack: Any) -> None:
        super().__init__("adversarial")
        self._attack = attack

    def around_gradients(self, gradients: Gradients, watch: Watch) -> Gradients:
        """One pass at the weights, one under attack."""

        def attacked() -> Tensor:
            self._made = True
            value = gradients()
            with self._attack.attacked():
                gradients()
            return value

        return attacked


class Agreement(Passes):
    """R-Drop: the loss twice, and how far the logits of both passes are apart.

    Args:
        model: Returns logits: a tensor, an output with `logits`, or a tuple that starts with them.
        alpha: Weight of the divergence.
    """

    def __init__(self, model: nn.Module, alpha: float) -> None:
        super().__init__("r_drop")
        self._alpha, self._compared = alpha, False
        self._seen: list[tuple[Tensor, Tensor, Any]] | None = None  # of the calls within a loss
        self._hook = unwrapped(model).register_forward_hook(self._see, with_kwargs=True)

    def around_loss(self, loss: Evaluate) -> Evaluate:
        """The mean of two, and the divergence."""

        def both() -> Tensor:
            self._made = True
            seen = self._seen = []
            try:
                first, second = loss(), loss()
            finally:
                self._seen = None
            if len(seen) != 2:
                raise RuntimeError(
                    f"r_drop needs one call of the model in each evaluation of the loss, got {len(seen)} in 2"
                )
            (logits, counts, items), (logits2, *_) = seen
            if not self._compared:
                self._compared = True  # once: the answer has to be waited for
                if torch.equal(logits, logits2):
                    warnings.warn(
                        "r_drop: both passes over the first batch gave the same logits, so there is nothing "
                        "to agree on; it needs dropout (of a model in training mode) or other noise",
                        stacklevel=4,
                    )
            if items is None:
                apart = divergence(logits, logits2, counts, "mean")
            else:  # a share of several micro-batches
                apart = divergence(logits, logits2, counts, "sum") / items
            return (first + second) * 0.5 + self._alpha * apart

        return both

    def remove(self) -> None:
        """Do not watch the model any more."""
        self._hook.remove()

    def _see(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._seen is None:
            return
        logits = getattr(output, "logits", output)
        logits = logits[0] if isinstance(logits, tuple) else logits
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"r_drop needs logits; the output of {type(model).__name__} is a {type(output).__name__}"
            )
        self._seen.append((logits, _counted(model, logits, kwargs), kwargs.get("num_items_in_batch")))


def _counted(model: nn.Module, logits: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """The positions that count: those with a label, or else those that are no padding."""
    for name, ignored in (("labels", -100), ("attention_mask", 0)):
        given = kwargs.get(name)
        if isinstance(given, Tensor) and given.shape == logits.shape[:-1]:
            counts = given != ignored
            if name == "labels" and given.dim() > 1 and shifts(model):  # each counts where it is predicted
                counts = torch.cat((counts[:, 1:], torch.zeros_like(counts[:, :1])), dim=1)
            return counts
    return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
