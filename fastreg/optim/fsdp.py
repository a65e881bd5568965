"""Brings models that FSDP2 shards out of forward passes; FSDP2 is not imported where it is not used."""

import contextlib
import sys
from typing import Any

from torch import nn


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Returns the modules of a model that FSDP2 shards."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Makes parameters shards again, which they are not between a forward and a backward pass."""
    for module in fsdp_modules(model):
        module.reshard()


def abandon_forward(model: nn.Module) -> None:
    """Resets FSDP2 after a failed forward pass, which would keep the parameters that it has gathered."""
    for module in fsdp_modules(model):
        if hasattr(module, "reset_iter_state"):
            with contextlib.suppress(RuntimeError):  # only the outermost may
                module.reset_iter_state()
        else:  # before torch 2.13
            state = module._get_fsdp_state()
            group, idle = state._fsdp_param_group, type(state._training_state).IDLE
            state._training_state, state._state_ctx.iter_forward_root = idle, None
            if group is not None:
                group._training_state = idle
