"""Callbacks that act on a model: dropout rates, noise, and passes over a batch with something changed."""

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import layerwise
from .. import nn as fastreg_nn
from ..common.batch_norm import frozen_running_stats
from ..common.unwrap import unwrap_model
from ..common.validation import check_range
from ..layerwise.inject import branches
from ..layerwise.sites import block_positions
from ..layerwise.write_rates import record_undo
from ..losses.r_drop import combine_passes, shifted, shifts
from .callbacks import Callback, Evaluate, Gradients, Passes, Watch

Times = Callable[[int], float]
"""A factor as a function of the step."""


class DropoutRates(Callback):
    """Dropout rates that are set once, or that change with the step.

    Sections are arguments of `layerwise.DropoutScheduler`, or of `set_dropout` where there is no schedule.
    The model stays as it was where an error is raised.
    """

    name = "dropout"

    def __init__(self, model: nn.Module, sections: list[dict[str, Any]]) -> None:
        self._undo = record_undo(model)
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
        """Sets the rates of the next step."""
        for scheduler in self._schedulers:
            scheduler.step(step)

    def state_dict(self) -> dict[str, Any]:
        """Returns the step of each schedule."""
        return {"last_step": [scheduler.last_step for scheduler in self._schedulers]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Sets the rates of the step that was saved."""
        for scheduler, step in zip(self._schedulers, state_dict["last_step"], strict=True):
            scheduler.step(step)

    def remove(self) -> None:
        """Restores rates, modules and hooks as they were."""
        self._schedulers = []
        undo, self._undo = self._undo, lambda: None
        undo()


class Noise(Callback):
    """Noise that is attached to a model, whose level may change by a factor with the step."""

    def __init__(self, name: str, attached: Any, factor: Times | None = None) -> None:
        self.name, self._attached = name, attached
        self._scheduler = None if factor is None else fastreg_nn.NoiseScheduler(attached, factor)

    def step(self, step: int | None = None) -> None:
        """Sets the level of the next step."""
        if self._scheduler is not None:
            self._scheduler.step(step)

    def state_dict(self) -> dict[str, Any]:
        """Returns the step of the schedule."""
        return {} if self._scheduler is None else self._scheduler.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Sets the level of the step that was saved."""
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state_dict)

    def remove(self) -> None:
        """Takes the noise away again."""
        self._scheduler = None
        self._attached.remove()


def find_branches(model: nn.Module) -> re.Pattern[str]:
    """Returns a pattern of the names of attention and MLP of every block; refuses models without any."""
    names = [
        f"{block}.{name}" for block in block_positions(model) for name in branches(model.get_submodule(block))
    ]
    if not names:
        raise ValueError(
            f"found no attention or MLP in repeated layers of {type(model).__name__}: give a pattern of "
            "names of modules"
        )
    return re.compile("|".join(map(re.escape, names)))


class NoisyWeights(Passes, Noise):
    """A `fastreg.WeightNoise` that is added in every pass."""

    def make_passes(self, gradients: Gradients, watch: Watch) -> Tensor:
        """Adds noise for the length of a pass."""
        self._made = True
        with watch:
            self._attached.perturb()
        try:
            return gradients()
        finally:
            with watch:
                self._attached.restore()

    def state_dict(self) -> dict[str, Any]:
        """Returns seed and count of the noise, and the step of the schedule."""
        return {"noise": self._attached.state_dict(), "levels": super().state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues the noise that was saved."""
        self._attached.load_state_dict(state_dict["noise"])
        super().load_state_dict(state_dict["levels"])

    def remove(self) -> None:
        """Does nothing, since weights have noise in passes only."""


class Adversarial(Passes):
    """A second pass with embeddings moved by `fastreg.FGM`, whose gradients are added."""

    name = "adversarial"

    def __init__(self, attack: Any) -> None:
        self._attack = attack

    def make_passes(self, gradients: Gradients, watch: Watch) -> Tensor:
        """Makes one pass at the weights, and one under attack."""
        self._made = True
        value = gradients()
        with self._attack.attacked():
            gradients()
        return value


class SharpnessAware(Callback):
    """A second pass where `fastreg.SAM` has moved the weights; BatchNorm sees the first pass only."""

    name = "sam"

    def __init__(self, optimizer: Any, model: nn.Module) -> None:
        self._optimizer, self._model = optimizer, model

    def make_passes(self, gradients: Gradients, watch: Watch) -> Tensor:
        """Perturbs by the first gradients and leaves the second ones; makes one pass where none is due."""
        value = gradients()
        if self._optimizer.due:
            with watch:
                self._optimizer.first_step()
            self._optimizer.zero_grad()
            with frozen_running_stats(self._model):
                gradients()
        return value

    def accumulate(self) -> None:
        """Restores the weights and keeps the gradients."""
        if self._optimizer.perturbed:
            self._optimizer.accumulate()


class RDropCallback(Passes):
    """R-Drop: evaluates the loss twice, and adds how far the logits of both passes are apart.

    Args:
        model: Returns logits: a tensor, an output with `logits`, or a tuple that starts with them.
        alpha: Weight of the divergence, >= 0; 1 to 5 in the paper.
    """

    name = "r_drop"

    def __init__(self, model: nn.Module, alpha: float = 1.0) -> None:
        self._alpha, self._compared = check_range("alpha", alpha, 0), False
        self._calls: list[tuple[Any, ...]] | None = None  # logits, counted positions, items
        self._hook = unwrap_model(model).register_forward_hook(self._record, with_kwargs=True)

    def evaluate(self, loss: Evaluate) -> Tensor:
        """Returns the mean of two losses, plus the divergence."""
        self._made = True
        calls = self._calls = []
        try:
            first, second = loss(), loss()
        finally:
            self._calls = None
        if len(calls) != 2:
            raise RuntimeError(
                f"r_drop needs one call of the model in each evaluation of the loss, got {len(calls)} in 2"
            )
        (logits, counts, items), (logits2, *_) = calls
        if not self._compared:
            self._compared = True  # once, since the comparison waits for the device
            if torch.equal(logits, logits2):
                warnings.warn(
                    "r_drop: both passes over the first batch gave the same logits, so there is nothing "
                    "to agree on; it needs dropout (of a model in training mode) or other noise",
                    stacklevel=4,
                )
        # With `items`, the loss is a share of several micro-batches.
        return combine_passes((first + second) * 0.5, logits, logits2, counts, self._alpha, items).loss

    def remove(self) -> None:
        """Removes the hook from the model."""
        self._hook.remove()

    def _record(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._calls is None:
            return
        logits = getattr(output, "logits", output)
        logits = logits[0] if isinstance(logits, tuple) else logits
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"r_drop needs logits; the output of {type(model).__name__} is a {type(output).__name__}"
            )
        self._calls.append((logits, _counted(model, logits, kwargs), kwargs.get("num_items_in_batch")))


def _counted(model: nn.Module, logits: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Returns which positions count: those with a label, or else those that are no padding."""
    for name, ignored in (("labels", -100), ("attention_mask", 0)):
        mask = kwargs.get(name)
        if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]:
            counts = mask != ignored
            if name == "labels" and mask.dim() > 1 and shifts(model):  # each counts where it is predicted
                counts = shifted(counts)
            return counts
    return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
