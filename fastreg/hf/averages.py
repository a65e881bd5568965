"""Averages in checkpoints and in the model that training leaves.

`optimizer.eval()` lets parameters hold the averages until `optimizer.train()`.  Trainer calls the one before
an evaluation and the other before every micro-batch, but neither where it saves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..engine.multi_tensor_optimizer import MultiTensorOptimizer
from ..optim.swap_averages import ACTIVE, TRAINED
from ..optim.wrapper import Wrapper
from .unwrap import layers, sam_of


def shown(optimizer: Any) -> bool:
    """Whether parameters hold averages now."""
    return any(ACTIVE in group for group in optimizer.param_groups)


@contextlib.contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """Within the block, parameters hold the averages; afterwards, what they held before.

    Weights that SAM has perturbed are left as they are: a checkpoint between both of its passes, such as on
    SIGTERM, holds the weights themselves in the optimizer's state.
    """
    sam = sam_of(optimizer)
    if shown(optimizer) or (sam is not None and sam.perturbed):
        yield
        return
    show(optimizer)
    try:
        yield
    finally:
        hide(optimizer)


def show(optimizer: Any) -> None:
    """Let parameters hold the averages, where the optimizer has some."""
    if hasattr(optimizer, "eval"):
        optimizer.eval()


def hide(optimizer: Any) -> None:
    """Let them hold what is trained."""
    if hasattr(optimizer, "train"):
        optimizer.train()


@torch.no_grad()
def continue_from_shown(optimizer: Any) -> None:
    """Go on from what parameters hold now, such as the best model, instead of what was trained."""
    for layer in layers(optimizer):
        holder = layer.state_holder if isinstance(layer, Wrapper) else layer
        for p, state in holder.state.items() if isinstance(holder, MultiTensorOptimizer) else ():
            if TRAINED in state:
                state[TRAINED].copy_(p)
