"""The gradients that an attack takes, and that nothing else of a model or of random numbers changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

Objective = nn.Module | Callable[[Any, Any], Tensor]
"""A model whose output are logits, or a loss of inputs and labels."""

MODES = ("eval", "train", "keep")


class Losses:
    """The losses of samples, and their gradients by the inputs alone.

    Args:
        objective: A model whose output, or its `logits`, are `[samples, classes, ...]`, and whose loss is the
            cross-entropy; or a function of inputs and labels that returns losses, `[samples]` or a scalar.
        y: The labels: classes, or probabilities.

    Raises:
        TypeError: If the objective is none.
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
        """`[samples]`; a scalar if the loss is one.

        Raises:
            TypeError: If what is returned is no loss, or are no logits.
            ValueError: If there are not as many losses as samples, or fewer than two classes.
        """
        found: Any
        if not isinstance(self.objective, nn.Module):
            found = self.objective(x, self.y)
        else:
            output = self.objective(x)
            logits = getattr(output, "logits", output)
            if not isinstance(logits, Tensor):
                raise TypeError(
                    f"the model must return logits or something with .logits, got {type(output).__name__}; "
                    "give a loss instead: lambda x, y: loss(model(x)[0], y)"
                )
            if logits.dim() < 2 or logits.shape[1] < 2:  # whose cross-entropy is 0, or over the samples
                raise ValueError(
                    f"the model must return logits [samples, classes, ...] of at least 2 classes, got shape "
                    f"{tuple(logits.shape)}; for a single logit give its loss instead: lambda x, y: "
                    'binary_cross_entropy_with_logits(model(x), y, reduction="none"), with model=model'
                )
            logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
            found = functional.cross_entropy(logits, self.y, reduction="none")
        if not isinstance(found, Tensor):
            raise TypeError(f"the loss must return a tensor, got {type(found).__name__}")
        if not found.dim() or (found.numel() == 1 and len(x) != 1):
            return found.reshape(())
        if len(found) != len(x):
            raise ValueError(
                f"the loss must return a scalar or [{len(x)}], a loss for each sample, got shape "
                f"{tuple(found.shape)}"
            )
        return found.flatten(1).sum(1) if found.dim() > 1 else found

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Losses, and the gradient of their sum: a mean would flush small ones of large batches to 0.

        Raises:
            ValueError: If the loss does not depend on the inputs.
        """
        if isinstance(self.y, Tensor) and self.y.is_inference():
            self.y = self.y.clone()  # which autograd may keep
        leaf = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        losses = self(leaf)
        found = (
            torch.autograd.grad(losses.sum(), leaf, allow_unused=True)[0] if losses.requires_grad else None
        )
        if found is None:
            raise ValueError(
                "the loss does not depend on x: is it computed within torch.no_grad(), or from x.detach()?"
            )
        return losses.detach(), found


def bare(objective: Objective) -> Objective:
    """Not wrapped for training on several devices, where it would wait for gradients that nobody computes."""
    return objective.module if isinstance(objective, DistributedDataParallel) else objective


def model_of(objective: Objective, model: nn.Module | None) -> nn.Module | None:
    """Whose modes and buffers are at stake."""
    return objective if model is None and isinstance(objective, nn.Module) else model


@contextlib.contextmanager
def undisturbed(model: nn.Module | None, mode: str, device: torch.device) -> Iterator[None]:
    """Within the block the model is in a mode and gradients are taken; afterwards all is as it was before.

    All are: the mode of every module, buffers, and the states of torch's random generators.

    Args:
        model: The model, if it is known.
        mode: `"eval"`, `"train"`, or `"keep"` for that in which every module is.
        device: Where the inputs are.

    Raises:
        ValueError: For an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    modules = [] if model is None else list(model.modules())
    modes = [module.training for module in modules]
    devices = {device, *(p.device for p in model.parameters())} if model is not None else {device}
    indices = sorted({d.index or 0 for d in devices if d.type not in ("cpu", "meta", "mps")})
    kind = next((d.type for d in devices if d.type not in ("cpu", "meta", "mps")), "cuda")
    with torch.random.fork_rng(indices, device_type=kind), torch.inference_mode(False), torch.enable_grad():
        try:
            if mode != "keep":
                for module in modules:  # not by train() and eval(), which may do more than that
                    module.training = mode == "train"
            with _other_buffers([module for module in modules if module.training]):
                yield
        finally:
            for module, training in zip(modules, modes, strict=True):
                module.training = training


@contextlib.contextmanager
def _other_buffers(modules: list[nn.Module]) -> Iterator[None]:
    """Within the block modules have copies of their buffers: those themselves may be part of a graph."""
    held = [(module, dict(module._buffers)) for module in modules]
    copies: dict[int, Tensor | None] = {id(None): None}
    try:
        for module, buffers in held:
            for name, buffer in buffers.items():
                if id(buffer) not in copies and buffer is not None:
                    copies[id(buffer)] = buffer.detach().clone()
                module._buffers[name] = copies[id(buffer)]
        yield
    finally:
        for module, buffers in held:
            module._buffers.update(buffers)
