"""Puts fused modules in the place of torch's."""

from __future__ import annotations

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
"""What takes the place of torch's modules, of just these classes."""
Model = TypeVar("Model", bound=nn.Module)


def replace_dropout(model: Model) -> Model:
    """Put `fastreg.nn.Dropout` in the place of every `nn.Dropout` of a model, with its rate, in place.

    `Dropout1d`, `Dropout2d` and `Dropout3d` are replaced likewise.  A module that stands in several places
    stays one; hooks stay.  State dicts are not changed.

    Args:
        model: Any module that is not a dropout itself.

    Returns:
        The model.
    """
    for module in list(model.modules()):
        if type(module) in FUSED:
            replace(model, module, FUSED[type(module)](module.p, module.inplace))
    return model


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put one module where another is, wherever that is: on the device there, with its mode and its hooks."""
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is old
    ]
    near = (p.device for module in (*(parent for parent, _ in places), model) for p in module.parameters())
    new.to(next(near, torch.device("cpu"))).train(old.training)
    vars(new).update({name: value for name, value in vars(old).items() if "_hook" in name})
    for parent, name in places:
        parent._modules[name] = new
