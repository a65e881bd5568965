"""Finds models and optimizers inside the wrappers that other libraries put around them."""

import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

Kind = TypeVar("Kind")

_OPTIMIZERS = ("optimizer", "original_optimizer", "base_optimizer")
"""Attributes under which wrappers of accelerate, Opacus and fastreg keep their optimizer."""


def unwrap_model(model: nn.Module, *, peft: bool = False) -> nn.Module:
    """Returns the innermost model inside wrappers.

    Known wrappers are `torch.compile`, `DataParallel`, `DistributedDataParallel`, FSDP, what
    `accelerate.Accelerator.prepare` returns (one of these), and fastreg's own, which name their model in
    `_wraps`. FSDP2 changes the class of a model in place and needs no unwrapping. With `peft`, the base model
    of a PEFT model is returned, too. Raises `TypeError` for anything but a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
    while (inside := _inside(model, peft)) is not None and inside is not model:
        model = inside
    return model


def _inside(model: nn.Module, peft: bool) -> nn.Module | None:
    """Returns the model inside the outermost wrapper, `None` if there is no wrapper."""
    compiled: Any = model._modules.get("_orig_mod") or model._modules.get(getattr(type(model), "_wraps", ""))
    if compiled is not None:
        return compiled
    wrapper: Any = model
    # FSDP is not imported for those who do not use it.
    fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    sharded = getattr(fsdp, "FullyShardedDataParallel", nn.DataParallel)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel, sharded)):
        return wrapper.module
    if peft and hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return wrapper.get_base_model()
    return None


def wrapped_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """Yields an optimizer and each that it wraps, from the outside in.

    Known wrappers are those of fastreg (`Lookahead`, `SAM`, `DPOptimizer`), accelerate and Opacus.
    """
    while isinstance(optimizer, torch.optim.Optimizer):
        yield optimizer
        optimizer = next((vars(optimizer)[name] for name in _OPTIMIZERS if name in vars(optimizer)), None)


def find_optimizer(optimizer: Any, kind: type[Kind]) -> Kind | None:
    """Returns the outermost optimizer of a kind, alone or in wrappers; `None` if there is none."""
    return next((layer for layer in wrapped_optimizers(optimizer) if isinstance(layer, kind)), None)
