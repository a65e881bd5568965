"""What an optimizer is beneath accelerate's wrapper and fastreg's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]

from ..optim import SAM
from ..optim.fused_optimizer import FusedOptimizer
from ..optim.wrapper import Wrapper


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that `Accelerator.prepare` was given; it alone has `first_step` and its like."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def layers(optimizer: Any) -> Iterator[Any]:
    """The optimizer, and each that it wraps, from the outside in."""
    optimizer = unwrapped(optimizer)
    yield optimizer
    while isinstance(optimizer, Wrapper):
        optimizer = optimizer.base_optimizer
        yield optimizer


def engine_of(optimizer: Any) -> FusedOptimizer | None:
    """The fastreg optimizer that does the step, if one does."""
    return next((layer for layer in layers(optimizer) if isinstance(layer, FusedOptimizer)), None)


def sam_of(optimizer: Any) -> SAM | None:
    """The `fastreg.SAM` among the layers, if there is one."""
    return next((layer for layer in layers(optimizer) if isinstance(layer, SAM)), None)


def is_ours(optimizer: Any) -> bool:
    """Whether the optimizer or a wrapper of it is fastreg's."""
    return isinstance(unwrapped(optimizer), (FusedOptimizer, Wrapper))
