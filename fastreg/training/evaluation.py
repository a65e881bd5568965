"""Evaluates models with the averages that their optimizers keep."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..common.module_state import preserve_modes
from ..common.unwrap import wrapped_optimizers
from ..optim.swap_averages import ACTIVE
from .batches import count_samples


@contextlib.contextmanager
def evaluate_with_averages(optimizer: Any) -> Iterator[None]:
    """Lets parameters hold their averages in the block: EMA, SWA, slow weights, the weights MSAM perturbs.

    Works with every optimizer that has `eval()` and `train()`, alone or in wrappers. Nothing happens for
    others, such as torch's, and where averages are swapped in already. Raises `RuntimeError` between the two
    passes of `fastreg.SAM`, whose weights are perturbed.
    """
    layers = wrapped_optimizers(optimizer)
    averaging: Any = next((o for o in layers if hasattr(o, "eval") and hasattr(o, "train")), None)
    if averaging is None or any(ACTIVE in group for group in averaging.param_groups):
        yield
        return
    averaging.eval()
    try:
        yield
    finally:
        averaging.train()


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> float | None:
    """Returns the mean loss over samples in evaluation mode, from those of batches; `None` without any."""
    total, count = 0.0, 0
    with preserve_modes(model):
        model.eval()
        for batch in batches:
            size = count_samples(batch)
            total += float(loss(batch)) * size
            count += size
    return total / count if count else None
