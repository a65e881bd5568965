"""Makes the second pass of SAM in a loop that accumulates gradients and makes only one.

micro-batches of a step     each a backward pass at the weights, as Trainer makes it
after the last              first_step, and every micro-batch once more at the perturbed weights
Trainer's optimizer.step()  the second step
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..common.batch_norm import frozen_running_stats
from ..optim import SAM

BackwardPass = Callable[[nn.Module, Any, Any], Tensor]
"""Computes gradients from (model, inputs, items in the batch), and returns the loss."""


class SecondPass:
    """Keeps the micro-batches of a step, and repeats them at the perturbed weights.

    Args:
        same_masks: Whether dropout and other random operations draw the same numbers in both passes.
    """

    def __init__(self, same_masks: bool) -> None:
        self.same_masks = same_masks
        self.clear()

    def clear(self) -> None:
        """Discards micro-batches that are kept, such as those of an interrupted run."""
        self._kept: list[tuple[Any, Any, RandomState | None]] = []
        self._devices: set[torch.device] | None = None
        self._norms = False

    def step(
        self, sam: SAM, backward: BackwardPass, accelerator: Any, model: nn.Module, inputs: Any, items: Any
    ) -> Tensor:
        """Makes the pass over a micro-batch, and after the last of a step the second pass over all.

        Args:
            sam: The optimizer.
            backward: Makes one pass.
            accelerator: The accelerator of the loop; its `sync_gradients` is true for the last micro-batch.
            model: As prepared.
            inputs: The micro-batch.
            items: How many items all micro-batches of the step have, by which the loss is scaled.

        Returns:
            The loss at the weights themselves.
        """
        if sam.perturbed:  # as loaded from a checkpoint that was saved between both passes
            sam.restore()
        if not sam.due:
            return backward(model, inputs, items)
        if self._devices is None:
            self._devices = {p.device for p in model.parameters()}
            self._norms = any(isinstance(module, _NormBase) for module in model.modules())
        state = RandomState(self._devices) if self.same_masks else None
        local = not sam.sync_perturbation and hasattr(model, "no_sync")
        with sam.maybe_no_sync(model) if local else contextlib.nullcontext():
            loss = backward(model, inputs, items)
        self._kept.append((inputs, items, state))
        if accelerator.sync_gradients:
            kept, self._kept = self._kept, []
            sam.first_step(zero_grad=True)
            with frozen_running_stats(model) if self._norms else contextlib.nullcontext():
                self._repeat(kept, backward, accelerator, model)
        return loss

    def _repeat(self, kept: list[Any], backward: BackwardPass, accelerator: Any, model: nn.Module) -> None:
        for index, (inputs, items, state) in enumerate(kept, 1):
            if state is not None:
                state.restore()
            with accelerator.no_sync(model) if index < len(kept) else contextlib.nullcontext():
                backward(model, inputs, items)


class RandomState:
    """The states of the random number generators that a forward pass may draw from.

    Args:
        devices: Devices of the model.
    """

    def __init__(self, devices: set[torch.device]) -> None:
        self._python, self._numpy = random.getstate(), numpy.random.get_state()
        self._cpu = torch.get_rng_state()
        self._others = {
            device: torch.get_device_module(device).get_rng_state(device)
            for device in devices
            if device.type not in ("cpu", "meta")
        }

    def restore(self) -> None:
        """Sets the generators to these states."""
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        for device, state in self._others.items():
            torch.get_device_module(device).set_rng_state(state, device)
