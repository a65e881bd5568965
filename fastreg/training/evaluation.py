"""Evaluates a model with the averages that its optimizer keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..optim.swap_averages import ACTIVE

_WRAPPED = ("optimizer", "original_optimizer", "base_optimizer")
"""Attributes under which accelerate's, Opacus' and other wrappers keep their optimizer."""


@contextlib.contextmanager
def evaluate_with_averages(optimizer: Any) -> Iterator[None]:
    """Lets parameters hold their averages in the block: EMA, SWA, slow weights, the weights MSAM perturbs.

    Works with every optimizer that has `eval()` and `train()`, alone or in wrappers. Nothing happens for
    others, such as torch's, and where averages are swapped in already.

    Args:
        optimizer: The optimizer of the model.

    Raises:
        RuntimeError: Between the two passes of `fastreg.SAM`, whose weights are perturbed.
    """
    optimizer = _with_averages(optimizer)
    if optimizer is None or any(ACTIVE in group for group in optimizer.param_groups):
        yield
        return
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()


def _with_averages(optimizer: Any) -> Any:
    """Returns the outermost optimizer with `eval()` and `train()`, `None` if there is none."""
    while isinstance(optimizer, torch.optim.Optimizer):
        if hasattr(optimizer, "eval") and hasattr(optimizer, "train"):
            return optimizer
        optimizer = next((vars(optimizer)[name] for name in _WRAPPED if name in vars(optimizer)), None)
    return None
