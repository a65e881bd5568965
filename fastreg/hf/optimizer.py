"""A fastreg optimizer in a Trainer: clipping, unscaling and averages, and the second pass of SAM."""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy
import torch
from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import TrainingArguments
from transformers.utils import logging

from ..common.batch_norm import frozen_running_stats
from ..common.unwrap import find_optimizer, wrapped_optimizers
from ..engine.multi_tensor_optimizer import MultiTensorOptimizer
from ..optim import SAM, ClipNorm
from ..optim.fused_optimizer import FusedOptimizer
from ..optim.swap_averages import ACTIVE, TRAINED
from ..optim.wrapper import Wrapper
from ..reference.step import scalar_dtype
from ..training.evaluation import evaluate_with_averages

logger = logging.get_logger(__name__)
DEFAULT_NORM: float = TrainingArguments.__dataclass_fields__["max_grad_norm"].default


def unwrap_optimizer(optimizer: Any) -> Any:
    """Returns the optimizer that `Accelerator.prepare` wrapped; it alone has methods such as `first_step`."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


class OptimizerInTrainer:
    """A fastreg optimizer, or a wrapper of fastreg's around any, as Trainer uses it.

    Clipping: Trainer clips in two passes over all gradients before the step.  Here the step does it, and the
    norm that it measures is logged.

    Loss scaling: accelerate hides from `torch.amp.GradScaler` which arguments the step takes.  The scaler
    then looks for infinities in a pass of its own, and accelerate takes every step as done, so that the
    learning rate changes where a step was skipped.  Both are mended here.

    Averages: `optimizer.eval()` lets parameters hold averages until `optimizer.train()`.  Trainer calls the
    one before an evaluation and the other before every micro-batch, but neither where it saves.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = unwrap_optimizer(optimizer)
        self.fused, self.sam = find_optimizer(optimizer, FusedOptimizer), find_optimizer(optimizer, SAM)
        self._clip: ClipNorm | None = None
        self._norm: Tensor | None = None
        self._accelerated: Any = None
        self._scaler: Any = None
        self._scale = 0.0

    @classmethod
    def find(cls, optimizer: Any, known: OptimizerInTrainer | None) -> OptimizerInTrainer | None:
        """Returns the view of an optimizer, or the known one of the same; `None` for other libraries'."""
        inner = unwrap_optimizer(optimizer)
        if known is not None and known.optimizer is inner:
            return known
        return cls(inner) if isinstance(inner, (FusedOptimizer, Wrapper)) else None

    # Clipping -------------------------------------------------------------------------------------------

    def clip_by(self, max_grad_norm: float) -> None:
        """Lets the step clip by its `ClipNorm`, or else by `max_grad_norm`; by 0 it only measures.

        Raises `ValueError` if both are set, to different norms.
        """
        if self.fused is None:
            return
        clip = next((c for c in self.fused.components if isinstance(c, ClipNorm)), None)
        if clip is None:
            self._clip = ClipNorm(max_grad_norm or math.inf)
            self.fused.add_component(self._clip)
        elif clip is self._clip:
            clip.max_norm = float(max_grad_norm or math.inf)
        elif max_grad_norm == DEFAULT_NORM != clip.max_norm:
            logger.warning(
                f"The optimizer's {clip!r} clips; max_grad_norm={DEFAULT_NORM} of TrainingArguments, its "
                "default, does not. Set max_grad_norm=0 to say so."
            )
        elif max_grad_norm not in (0, clip.max_norm):
            raise ValueError(
                f"max_grad_norm={max_grad_norm} of TrainingArguments and {clip!r} of the optimizer "
                "contradict each other: set max_grad_norm=0, or leave ClipNorm out"
            )

    def norm_of_next_step(self, fused: FusedOptimizer) -> Tensor:
        """Returns the norm of the next step: 0-d, on the device, where `after_step` writes it."""
        if self._norm is None:
            device = next(p.device for group in fused.param_groups for p in group["params"])
            self._norm = torch.zeros((), dtype=scalar_dtype(device), device=device)
        return self._norm

    # Steps ----------------------------------------------------------------------------------------------

    def begin(self, optimizer: Any) -> None:
        """Prepares the optimizer, as `Accelerator.prepare` returned it, for a run."""
        self._accelerated, self._scaler = optimizer, getattr(optimizer, "scaler", None)
        if self._scaler is None:
            return
        if isinstance(optimizer, AcceleratedOptimizer):
            # The scaler asks the signature of `step` whether it may hand itself over.
            functools.update_wrapper(
                optimizer._optimizer_patched_step_method, optimizer._optimizer_original_step_method
            )
        self._scale = self._scaler.get_scale()

    def after_step(self) -> None:
        """Notes the norm of the step, and whether it was skipped; only under a scaler the host waits."""
        if self._norm is not None and self.fused is not None and (norm := self.fused.grad_norm) is not None:
            self._norm.copy_(norm)
        if self._scaler is not None:
            before, self._scale = self._scale, self._scaler.get_scale()
            self._accelerated._is_overflow = self._scale < before

    # Averages -------------------------------------------------------------------------------------------

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which parameters hold the averages.

        Weights that SAM has perturbed are left as they are: a checkpoint between both of its passes, such as
        on SIGTERM, holds the weights themselves in the optimizer's state.
        """
        if self.sam is not None and self.sam.perturbed:
            return contextlib.nullcontext()
        return evaluate_with_averages(self.optimizer)

    def swap_in(self) -> None:
        """Lets parameters hold the averages, if the optimizer has some."""
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()

    def swap_out(self) -> None:
        """Lets parameters hold the weights that are trained."""
        if any(ACTIVE in group for group in self.optimizer.param_groups):
            self.optimizer.train()

    @torch.no_grad()
    def continue_from_averages(self) -> None:
        """Continues from what parameters hold now, such as the best model, instead of the trained weights."""
        for layer in wrapped_optimizers(self.optimizer):
            holder = layer.state_holder if isinstance(layer, Wrapper) else layer
            for p, state in holder.state.items() if isinstance(holder, MultiTensorOptimizer) else ():
                if TRAINED in state:
                    state[TRAINED].copy_(p)


# SAM's second pass ------------------------------------------------------------------------------------------

BackwardPass = Callable[[nn.Module, Any, Any], Tensor]
"""Computes gradients from (model, inputs, items in the batch), and returns the loss."""


class SecondPass:
    """Keeps the micro-batches of a step, and repeats them at the perturbed weights of SAM.

    Each micro-batch of a step gets a backward pass at the weights, as Trainer makes it.  After the last one
    come `first_step`, and all micro-batches once more at the perturbed weights.  Trainer's `optimizer.step()`
    is the second step.  With `same_masks`, dropout and the like draw the same numbers in both passes.
    """

    def __init__(self, same_masks: bool) -> None:
        self.same_masks = same_masks
        self.clear()

    def clear(self) -> None:
        """Discards micro-batches that are kept, such as those of an interrupted run."""
        self._kept: list[tuple[Any, Any, contextlib.ExitStack]] = []
        self._devices: set[torch.device] | None = None
        self._norms = False

    def step(
        self, sam: SAM, backward: BackwardPass, accelerator: Any, model: nn.Module, inputs: Any, items: Any
    ) -> Tensor:
        """Makes the pass over a micro-batch, and after the last of a step the second pass over all.

        The last is the one with `accelerator.sync_gradients`.  Returns the loss at the weights themselves.
        """
        if sam.perturbed:  # as loaded from a checkpoint that was saved between both passes
            sam.restore()
        if not sam.due:
            return backward(model, inputs, items)
        if self._devices is None:
            self._devices = {p.device for p in model.parameters()}
            self._norms = any(isinstance(module, _NormBase) for module in model.modules())
        state = random_state(self._devices) if self.same_masks else contextlib.ExitStack()
        local = not sam.sync_perturbation and hasattr(model, "no_sync")
        with sam.maybe_no_sync(model) if local else contextlib.nullcontext():
            loss = backward(model, inputs, items)
        self._kept.append((inputs, items, state))
        if accelerator.sync_gradients:
            kept, self._kept = self._kept, []
            sam.first_step(zero_grad=True)
            with frozen_running_stats(model) if self._norms else contextlib.nullcontext():
                for number, (inputs, items, state) in enumerate(kept, 1):
                    state.close()
                    with accelerator.no_sync(model) if number < len(kept) else contextlib.nullcontext():
                        backward(model, inputs, items)
        return loss


def random_state(devices: Iterable[torch.device]) -> contextlib.ExitStack:
    """Returns a stack; its `close` restores the generators of a forward pass to their present states."""
    stack = contextlib.ExitStack()
    stack.callback(random.setstate, random.getstate())
    stack.callback(numpy.random.set_state, numpy.random.get_state())
    stack.callback(torch.set_rng_state, torch.get_rng_state())
    for device in devices:
        if device.type not in ("cpu", "meta"):
            module = torch.get_device_module(device)
            stack.callback(module.set_rng_state, module.get_rng_state(device), device)
    return stack
