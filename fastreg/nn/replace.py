"""Puts fused modules in the place of torch's."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from .dropout import Dropout
from .spatial import Dropout1d, Dropout2d, Dropout3d

_FUSED: dict[type, type] = {
    nn.Dropout: Dropout,
    nn.Dropout1d: Dropout1d,
    nn.Dropout2d: Dropout2d,
    nn.Dropout3d: Dropout3d,
}
Model = TypeVar("Model", bound=nn.Module)


def replace_dropout(model: Model) -> Model:
    """Put `fastreg.nn.Dropout` in the place of every `nn.Dropout` of a model, with its rate, in place.

    `Dropout1d`, `Dropout2d` and `Dropout3d` are replaced likewise.  A module that stands in several places
    stays one.  State dicts are not changed.

    Args:
        model: Any module that is not a dropout itself.

    Returns:
        The model.
    """
    made: dict[nn.Module, nn.Module] = {}
    for module in list(model.modules()):
        device = next((p.device for p in module.parameters()), None)
        for name, child in list(module._modules.items()):
            if child is not None and (kind := _FUSED.get(type(child))) is not None:
                if child not in made:
                    made[child] = kind(child.p, child.inplace).to(device).train(child.training)
                setattr(module, name, made[child])
    return model
