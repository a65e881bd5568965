"""The setup of a run, which contenders change, and the optimizers made of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...layerwise import set_dropout
from ...nn.replace import replace
from ...privacy import DPOptimizer
from ...recipe import Callbacks, Regularization
from ..usage import require

Made = tuple[torch.optim.Optimizer, Callbacks]


def make_from_fields(setup: Setup) -> Made:
    """Returns `fastreg.AdamW` with all fields of the setup, see `fastreg.Regularization`."""
    # All weights decay, as with torch.optim.AdamW(model.parameters()).
    decay = {"rate": setup.weight_decay, "exclude": False, **setup.fields.get("weight_decay", {})}
    recipe = Regularization.from_dict({**setup.fields, "weight_decay": decay})
    return recipe.apply(setup.model, setup.lr, setup.steps, setup.seed)


def _make_torch_adamw(setup: Setup) -> Made:
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
    """The part of a run that a contender may change; everything else is the same for all."""

    model: Any
    lr: float
    weight_decay: float
    seed: int
    steps: int  # of the whole run
    batch_size: int = 1
    windows: int = 1  # of the training text, that do not overlap
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)  # of a `fastreg.Regularization`
    make: Callable[[Setup], Made] = make_from_fields

    def add(self, **fields: dict[str, Any]) -> None:
        """Adds settings to the fields of the recipe.

        Raises:
            ValueError: If one is there already, with another value.
        """
        for name, settings in fields.items():
            section = self.fields.setdefault(name, {})
            for key, value in settings.items():
                if (other := section.setdefault(key, value)) is not value and other != value:
                    raise ValueError(f"{name}.{key} is given more than once, as {section[key]} and {value}")


def use_torch(setup: Setup, strength: float | None = None) -> None:
    """Lets a setup make `torch.optim.AdamW`, at its best setting."""
    setup.make = _make_torch_adamw


def make_private(setup: Setup, noise_multiplier: float) -> None:
    """Puts the optimizer that a setup would make into `fastreg.DPOptimizer`."""
    inner = setup.make

    def make(setup: Setup) -> Made:
        require("compare --with dp", "privacy", "opacus")
        if several := [name for name in ("adversarial", "r_drop") if name in setup.fields]:
            raise ValueError(
                f"{several[0]} makes several passes over a sample, whose gradients add up unclipped"
            )
        optimizer, callbacks = inner(setup)
        with warnings.catch_warnings():  # with a seed, so that runs can be repeated; the text is no secret
            warnings.filterwarnings("ignore", message="noise_seed")
            private = DPOptimizer(
                optimizer, model=setup.model, noise_multiplier=noise_multiplier, max_grad_norm=1.0,
                expected_batch_size=setup.batch_size, accountant="rdp",
                sample_rate=min(1.0, setup.batch_size / setup.windows), noise_seed=setup.seed,
                reproducible=True,
            )  # fmt: skip
        return private, callbacks

    setup.make = make


def replace_dropout(model: Any, rates: Any, make: Callable[[float], nn.Module]) -> None:
    """Puts modules made from rates over layers in the place of dropout behind attention and MLP.

    Raises:
        ValueError: If the model has no module there.
    """
    for row in set_dropout(model, rates):
        if row.how != "module":
            raise ValueError(f"{row.path} of {type(model).__name__} is no module that could be replaced")
        replace(model, model.get_submodule(row.path), make(row.rate))
