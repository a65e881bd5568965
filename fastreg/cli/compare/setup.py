"""The setup of a run, which contenders change, and the optimizer made of it."""

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
    recipe: Regularization | None = None  # in place of one with these fields
    torch_adamw: bool = False  # in place of what a recipe makes
    noise_multiplier: float | None = None  # of private training

    def add(self, **fields: dict[str, Any]) -> None:
        """Adds settings to the fields; raises `ValueError` if one is there already with another value."""
        for name, settings in fields.items():
            section = self.fields.setdefault(name, {})
            for key, value in settings.items():
                if (other := section.setdefault(key, value)) is not value and other != value:
                    raise ValueError(f"{name}.{key} is given more than once, as {section[key]} and {value}")

    def make(self) -> tuple[torch.optim.Optimizer, Callbacks]:
        """Returns the optimizer and the callbacks of the run.

        Raises `ValueError` for values out of range, and for ingredients that do not go together.
        """
        if self.torch_adamw:
            if self.fields:
                raise ValueError(
                    f"torch.optim.AdamW is compared as it is, got {', '.join(self.fields)}; leave 'torch' "
                    "out of the combination"
                )
            weights = self.model.parameters()
            optimizer: Any = torch.optim.AdamW(weights, self.lr, weight_decay=self.weight_decay, fused=True)
            callbacks = Callbacks()
        else:
            # All weights decay, as with torch.optim.AdamW(model.parameters()).
            decay = {"rate": self.weight_decay, "exclude": False, **self.fields.get("weight_decay", {})}
            recipe = self.recipe or Regularization.from_dict({**self.fields, "weight_decay": decay})
            optimizer, callbacks = recipe.apply(self.model, self.lr, self.steps, self.seed)
        if self.noise_multiplier is not None:
            optimizer = self._make_private(optimizer, self.noise_multiplier)
        return optimizer, callbacks

    def _make_private(self, optimizer: torch.optim.Optimizer, noise_multiplier: float) -> DPOptimizer:
        require("compare --with dp", "privacy", "opacus")
        if several := [name for name in ("adversarial", "r_drop") if name in self.fields]:
            raise ValueError(
                f"{several[0]} makes several passes over a sample, whose gradients add up unclipped"
            )
        with warnings.catch_warnings():  # with a seed, so that runs can be repeated; the text is no secret
            warnings.filterwarnings("ignore", message="noise_seed")
            return DPOptimizer(
                optimizer, model=self.model, noise_multiplier=noise_multiplier, max_grad_norm=1.0,
                expected_batch_size=self.batch_size, accountant="rdp",
                sample_rate=min(1.0, self.batch_size / self.windows), noise_seed=self.seed,
                reproducible=True,
            )  # fmt: skip


def replace_dropout(model: Any, rates: Any, make: Callable[[float], nn.Module]) -> None:
    """Puts modules made from rates over layers in the place of dropout behind attention and MLP.

    Raises `ValueError` if the model has no module there.
    """
    for row in set_dropout(model, rates):
        if row.how != "module":
            raise ValueError(f"{row.path} of {type(model).__name__} is no module that could be replaced")
        replace(model, model.get_submodule(row.path), make(row.rate))
