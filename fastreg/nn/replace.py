"""Replaces dropout modules of torch by fused ones."""

from typing import Any, TypeVar

import torch
from torch import nn

from .dropout import Dropout
from .spatial import Dropout1d, Dropout2d, Dropout3d

FUSED: dict[type[nn.Module], Any] = {
    nn.Dropout: Dropout,
    nn.Dropout1d: Dropout1d,
    nn.Dropout2d: Dropout2d,
    nn.Dropout3d: Dropout3d,
}
"""The replacement of each class of torch; subclasses are left alone."""
Model = TypeVar("Model", bound=nn.Module)


def replace_dropout(model: Model) -> Model:
    """Replaces every `nn.Dropout` of a model by `fastreg.nn.Dropout` with its rate, in place.

    Also replaces `Dropout1d`, `Dropout2d` and `Dropout3d`.  A shared module stays shared; hooks and state
    dicts are kept.

    Args:
        model: Any module except a dropout.

    Returns:
        The model.
    """
    for module in list(model.modules()):
        if type(module) in FUSED:
            replace(model, module, FUSED[type(module)](module.p, module.inplace))
    return model


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replaces a module wherever a model holds it; the new one gets its device, mode and hooks."""
    parents = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is old
    ]
    devices = (
        p.device for module in (*(parent for parent, _ in parents), model) for p in module.parameters()
    )
    new.to(next(devices, torch.device("cpu"))).train(old.training)
    vars(new).update({name: value for name, value in vars(old).items() if "_hook" in name})
    for parent, name in parents:
        parent._modules[name] = new
