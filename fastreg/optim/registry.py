"""Lists the optimizers: recipes, tests, benchmarks and the README go through this table."""

import inspect
from dataclasses import dataclass, field
from typing import Any

from .adam import Adam, AdamW
from .fused_optimizer import FusedOptimizer
from .lion import Lion
from .sgd import SGD

__all__ = [
    "SGD", "Adam", "AdamW", "Lion",
]  # fmt: skip


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer and the settings of it that run different kernels.

    Attributes:
        optimizer: The class that users import.
        features: Named in parentheses by the README.
        variants: Options by the name that chains of the benchmarks use; each has a row in
            `benchmarks/chains.py`, so that the audit limits its cost.
    """

    optimizer: type[FusedOptimizer]
    features: str = ""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the constructor with their defaults, those in its `**options` among them."""
        parameters = dict(inspect.signature(self.optimizer).parameters)
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            parameters |= inspect.signature(FusedOptimizer._init_components).parameters
        return {
            name: parameter.default
            for name, parameter in parameters.items()
            if name != "params" and parameter.default is not parameter.empty
        }


OPTIMIZERS = {
    "adamw": OptimizerEntry(AdamW, "", {"AdamW": {}, "AdamW-cautious": {"decay": "cautious"}}),
    "adam": OptimizerEntry(Adam, "AMSGrad", {"Adam-amsgrad": {"amsgrad": True, "weight_decay": 0.1}}),
    "sgd": OptimizerEntry(
        SGD,
        "momentum, dampening, Nesterov",
        {
            "SGD": {},
            "SGD-momentum": {"momentum": 0.9},
            "SGD-momentum-decay": {"momentum": 0.9, "weight_decay": 0.1},
            "SGD-nesterov": {"momentum": 0.9, "nesterov": True},
        },
    ),
    "lion": OptimizerEntry(Lion, "", {"Lion": {}}),
}
"""All optimizers, by the name that a recipe gives them."""
