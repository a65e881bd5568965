"""Callbacks beside an optimizer: passes over a batch, rates that change, noise that is attached.

`Regularization.apply` makes them; its class shows the two lines that a loop needs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import torch

Evaluate = Callable[[], Tensor]
"""Evaluates the model on a batch and returns the loss, with its graph."""
Gradients = Callable[[], Tensor]
"""Evaluates the model on a batch, adds to the gradients and returns the loss, without a graph."""
Watch = contextlib.AbstractContextManager[Any]
"""Entered around all that the optimizer does, several times a step."""
_IDLE: Watch = contextlib.nullcontext()


class Callback:
    """Base of the callbacks, whose methods do nothing.

    Attributes:
        name: Its key in the `state_dict` of `Callbacks`.
    """

    name = "callback"

    def step(self, step: int | None = None) -> None:
        """Sets what changes with the step, after every step of the optimizer.

        Args:
            step: How many steps there were; by default one more than at the latest call.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint needs."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the state that `state_dict` returned."""

    def remove(self) -> None:
        """Leaves the model as it was before; may be called more than once."""

    def evaluate(self, loss: Evaluate) -> Tensor:
        """Computes the loss, or a function of several evaluations of it."""
        return loss()

    def make_passes(self, gradients: Gradients, watch: Watch) -> Tensor:
        """Makes one forward and backward pass, or several; returns the loss at the weights themselves."""
        return gradients()

    def accumulate(self) -> None:
        """Prepares for another micro-batch of the same step."""


class Callbacks(list[Callback]):
    """Several callbacks as one; the passes of later ones are around those of earlier ones."""

    def step(self, step: int | None = None) -> None:
        """Sets what changes with the step, see `Callback.step`.

        Raises:
            RuntimeError: If a regularizer needs passes of its own that have not been made.
        """
        for callback in self:
            callback.step(step)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of each callback, by its name."""
        return {callback.name: callback.state_dict() for callback in self}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the state that `state_dict` returned.

        Raises:
            ValueError: If the state is that of other callbacks.
        """
        names = [callback.name for callback in self]
        if sorted(names) != sorted(state_dict):
            raise ValueError(
                f"the state is of the callbacks {', '.join(sorted(state_dict)) or 'none'}; these are "
                f"{', '.join(sorted(names)) or 'none'}: apply the recipe that it was saved with"
            )
        for callback in self:
            callback.load_state_dict(state_dict[callback.name])

    def remove(self) -> None:  # type: ignore[override]  # undoes all, while a list would drop one
        """Leaves the model as it was before."""
        for callback in reversed(self):
            callback.remove()

    def gradients(
        self, loss: Evaluate, *, backward: Callable[[Tensor], Any] | None = None, accumulate: bool = False,
        watch: Watch | None = None,
    ) -> Tensor:  # fmt: skip
        """Makes all passes over a batch, and leaves the gradients for `optimizer.step()`.

        Args:
            loss: Evaluates the model on the batch, with gradients; called once for each pass.
            backward: How a loss is differentiated, `Tensor.backward` by default; such as
                `accelerator.backward`.
            accumulate: Whether this is a micro-batch that others follow before the step.
            watch: Entered around what the optimizer does here (the perturbation of SAM).

        Returns:
            The loss at the weights themselves, without a graph.
        """
        for callback in self:
            loss = functools.partial(callback.evaluate, loss)

        def once() -> Tensor:
            value = loss()
            (backward or Tensor.backward)(value)
            return value.detach()

        gradients: Gradients = once
        for callback in self:
            gradients = functools.partial(callback.make_passes, gradients, _IDLE if watch is None else watch)
        value = gradients()
        if accumulate:
            for callback in self:
                callback.accumulate()
        return value

    def training_step(
        self, loss: Evaluate, optimizer: torch.optim.Optimizer, *, watch: Watch | None = None
    ) -> Tensor:
        """Makes a whole step: all passes over the batch, the optimizer's step, and cleared gradients.

        `loss` and the result are those of `gradients`; `watch` is entered around all that the optimizer does.
        """
        watch = _IDLE if watch is None else watch
        value = self.gradients(loss, watch=watch)
        with watch:
            optimizer.step()
        optimizer.zero_grad()
        return value


class Passes(Callback):
    """Base of callbacks that make passes of their own, and notice when these are left out."""

    _made = False
    _last: int | None = None

    def step(self, step: int | None = None) -> None:
        """Raises `RuntimeError` if the passes of this step have not been made."""
        began = step is not None and self._last in (None, step)  # before the first step of this process
        if not self._made and not began:
            raise RuntimeError(
                f"{self.name} needs passes of its own, and this step was made without them: use "
                "callbacks.training_step(loss, optimizer), or callbacks.gradients(loss) instead of "
                "loss.backward()"
            )
        self._made, self._last = False, (self._last or 0) + 1 if step is None else step
        super().step(step)
