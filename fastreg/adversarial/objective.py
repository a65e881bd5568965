"""Computes the gradients of attacks, and preserves the state of models and random generators."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from ..common.module_state import devices_of, preserve_buffers, preserve_modes, preserve_rng
from ..common.validation import check_choice

Objective = nn.Module | Callable[[Any, Any], Tensor]
"""A model that returns logits, or a function of inputs and labels that returns a loss."""

MODES = ("eval", "train", "keep")


class Losses:
    """The losses of samples, and their gradients with respect to the inputs.

    For the arguments see `fgsm`.

    Raises:
        TypeError: If the objective is not callable.
    """

    def __init__(self, objective: Objective, y: Any) -> None:
        if not callable(objective):
            raise TypeError(
                "the first argument must be a model that returns logits or a loss(x, y), got "
                f"{type(objective).__name__}"
            )
        self.objective = objective
        self.y = y

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the losses, `[samples]`, or a scalar if the loss is one.

        Raises:
            TypeError: If no tensor is returned.
            ValueError: If there are not as many losses as samples, or fewer than two classes.
        """
        losses: Any
        if not isinstance(self.objective, nn.Module):
            losses = self.objective(x, self.y)
        else:
            output = self.objective(x)
            logits = getattr(output, "logits", output)
            if not isinstance(logits, Tensor):
                raise TypeError(
                    f"the model must return logits or something with .logits, got {type(output).__name__}; "
                    "give a loss instead: lambda x, y: loss(model(x)[0], y)"
                )
            if logits.dim() < 2 or logits.shape[1] < 2:  # cross-entropy would be 0, or over the samples
                raise ValueError(
                    f"the model must return logits [samples, classes, ...] of at least 2 classes, got shape "
                    f"{tuple(logits.shape)}; for a single logit give its loss instead: lambda x, y: "
                    'binary_cross_entropy_with_logits(model(x), y, reduction="none"), with model=model'
                )
            logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
            losses = functional.cross_entropy(logits, self.y, reduction="none")
        if not isinstance(losses, Tensor):
            raise TypeError(f"the loss must return a tensor, got {type(losses).__name__}")
        if not losses.dim() or (losses.numel() == 1 and len(x) != 1):
            return losses.reshape(())
        if len(losses) != len(x):
            raise ValueError(
                f"the loss must return a scalar or [{len(x)}], a loss for each sample, got shape "
                f"{tuple(losses.shape)}"
            )
        return losses.flatten(1).sum(1) if losses.dim() > 1 else losses

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the losses, and the gradient of their sum: a mean would underflow for large batches.

        Raises:
            ValueError: If the loss does not depend on the inputs.
        """
        if isinstance(self.y, Tensor) and self.y.is_inference():
            self.y = self.y.clone()  # autograd cannot save inference tensors
        leaf = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        losses = self(leaf)
        gradient = (
            torch.autograd.grad(losses.sum(), leaf, allow_unused=True)[0] if losses.requires_grad else None
        )
        if gradient is None:
            raise ValueError(
                "the loss does not depend on x: is it computed within torch.no_grad(), or from x.detach()?"
            )
        return losses.detach(), gradient


def unwrap_ddp(objective: Objective) -> Objective:
    """Returns the model inside `DistributedDataParallel`, which would wait for gradients of parameters."""
    inner = getattr(objective, "_orig_mod", objective)  # compiled or not
    return inner.module if isinstance(inner, DistributedDataParallel) else objective


def model_of(objective: Objective, model: nn.Module | None) -> nn.Module | None:
    """Returns the model whose modes and buffers are preserved, `None` if it is not known."""
    if not isinstance(model, nn.Module | None):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
    return objective if model is None and isinstance(objective, nn.Module) else model


@contextlib.contextmanager
def preserve_state(model: nn.Module | None, mode: str, device: torch.device) -> Iterator[None]:
    """Sets the mode of a model and enables gradients for the block, and restores all state after it.

    Restored are the mode of every module, buffers, and the states of torch's random generators, those of the
    model's devices and of `device`.  The mode is `"eval"`, `"train"`, or `"keep"` for the present ones.

    Raises:
        ValueError: For an unknown mode.
    """
    check_choice("mode", mode, MODES)
    with (
        preserve_rng({device, *devices_of(model)}),
        torch.inference_mode(False),
        torch.enable_grad(),
        preserve_modes(model, None if mode == "keep" else mode == "train"),
        preserve_buffers([] if model is None else [m for m in model.modules() if m.training]),
    ):
        yield
