"""The written list of chains that fastreg ships, for the code audit and the benchmarks.

Each row says what a step must move and what it may cost: bytes per parameter follow from the dtypes, the
instruction budgets are for sm_90 and are what keeps a step bound by memory rather than by issue.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

import fastreg
from fastreg.chain import Chain

MAX_NORM, STD, DECAY = 1.0, 0.01, 0.999


class Shipped(NamedTuple):
    """A chain at a combination of dtypes, with what the audit holds it to."""

    name: str
    storage: str  # "fp32", "mixed" (bf16 weights and gradients, fp32 state) or "bf16"
    chain: Chain
    dtypes: tuple[torch.dtype, ...]
    budget: float  # instructions per parameter on sm_90

    @property
    def bytes(self) -> int:
        """Per parameter: weight and state read and written, gradient read."""
        weight, gradient, *state = (dtype.itemsize for dtype in self.dtypes)
        return 2 * weight + gradient + 2 * sum(state)

    @property
    def bytes_with_norm(self) -> int:
        """Per parameter, with the reading of the gradient for its norm where the chain clips."""
        return self.bytes + self.dtypes[1].itemsize * ("clip" in self.name)


OPTIMIZERS = {
    "AdamW": (fastreg.AdamW, {}),
    "SGD": (fastreg.SGD, {}),
    "SGD-momentum": (fastreg.SGD, {"momentum": 0.9}),
    "SGD-nesterov": (fastreg.SGD, {"momentum": 0.9, "nesterov": True}),
    "Lion": (fastreg.Lion, {}),
}

# Instructions per parameter on sm_90: (fp32, mixed, bf16).
BUDGETS = {
    "AdamW": (32, 35.7, 35.7),
    "clip+AdamW": (31, 36.9, 36.9),
    "clip+AdamW+EMA": (35.2, 42.4, 42.4),
    "clip+noise+AdamW+EMA": (81.4, 88, 88),
    "SGD": (9.5, 11.5, 11.5),
    "SGD-momentum": (14, 18.5, 17),
    "SGD-nesterov": (17.5, 21.5, 19.5),
    "Lion": (20, 24, 23),
}
STORAGES = ("fp32", "mixed", "bf16")


def rule(name: str) -> str:
    """The update rule of a chain: "AdamW" of "clip+AdamW+EMA"."""
    (found,) = set(name.split("+")) & OPTIMIZERS.keys()
    return found


def optimizer(name: str, params: Iterable[Any], max_norm: float = MAX_NORM, **options: Any) -> fastreg.AdamW:
    """The fastreg optimizer that runs the chain of this name.

    Args:
        name: Such as "clip+noise+AdamW+EMA".
        params: The parameters.
        max_norm: For the clipping, where the chain clips.
        options: For the optimizer, such as `lr`.
    """
    pieces = {
        "clip": fastreg.ClipNorm(max_norm),
        "noise": fastreg.GradientNoise(STD),
        "EMA": fastreg.EMA(DECAY),
    }
    make, settings = OPTIMIZERS[rule(name)]
    chosen = [piece for key, piece in pieces.items() if key in name.split("+")]
    return make(params, regularizers=chosen, **settings, **options)


def shipped() -> Iterator[Shipped]:
    """Every chain at every combination of dtypes."""
    for name, budgets in BUDGETS.items():
        for storage, budget in zip(STORAGES, budgets, strict=True):
            yield at(name, storage, budget)


def at(name: str, storage: str, budget: float = float("inf")) -> Shipped:
    """The chain of this name at a combination of dtypes."""
    made = optimizer(name, [torch.nn.Parameter(torch.zeros(1))])
    chain = made.chain(made.param_groups[0])
    weight = torch.float32 if storage == "fp32" else torch.bfloat16
    state = {"parameter": torch.float32 if storage == "mixed" else weight, "compute": torch.float32}
    dtypes = (weight, weight, *(state.get(b.dtype, b.dtype) for b in chain.buffers))
    return Shipped(name, storage, chain, dtypes, budget)
