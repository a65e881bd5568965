"""What a contender may change of a run, and the optimizers made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from ..recipe import Callbacks

    Made = tuple[Optimizer, Callbacks]


def from_fields(setup: Setup) -> Made:
    """`fastreg.AdamW` with all that the setup's fields say, see `fastreg.Regularization`."""
    from ..recipe import Regularization

    # All weights decay, as with torch.optim.AdamW(model.parameters()).
    decay = {"rate": setup.weight_decay, "exclude": False, **setup.fields.get("weight_decay", {})}
    recipe = Regularization.from_dict({**setup.fields, "weight_decay": decay})
    return recipe.apply(setup.model, setup.lr, setup.steps, setup.seed)


def torch_adamw(setup: Setup) -> Made:
    """`torch.optim.AdamW` at its best setting."""
    import torch

    from ..recipe import Callbacks

    if setup.fields:
        raise ValueError(
            f"torch.optim.AdamW is compared as it is, got {', '.join(setup.fields)}; leave 'torch' out of "
            "the combination"
        )
    optimizer = torch.optim.AdamW(
        setup.model.parameters(), lr=setup.lr, weight_decay=setup.weight_decay, fused=True
    )
    return optimizer, Callbacks()


@dataclass
class Setup:
    """What a contender may change; everything else is the same for all."""

    model: nn.Module
    lr: float
    weight_decay: float
    seed: int
    steps: int  # of the whole run
    batch_size: int = 1
    windows: int = 1  # of the training share, that do not overlap
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)  # of a `fastreg.Regularization`
    make: Callable[[Setup], Made] = from_fields

    def add(self, **fields: dict[str, Any]) -> None:
        """Add settings to the fields.

        Raises:
            ValueError: If one is there already, with another value.
        """
        for name, settings in fields.items():
            here = self.fields.setdefault(name, {})
            for key, value in settings.items():
                if here.setdefault(key, value) != value:
                    raise ValueError(f"{name}.{key} is given more than once, as {here[key]} and {value}")
