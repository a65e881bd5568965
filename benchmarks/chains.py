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

MAX_NORM, VALUE, STD, STRENGTH, DECAY = 1.0, 1.0, 0.01, 1e-3, 0.999


class Shipped(NamedTuple):
    """A chain at a combination of dtypes, with what the audit holds it to."""

    name: str
    storage: str  # one of `STORAGES`
    chain: Chain
    dtypes: tuple[torch.dtype, ...]
    budget: float  # instructions per parameter on sm_90

    @property
    def bytes(self) -> int:
        """Per parameter: weight and state read and written, gradient read."""
        weight, gradient, *state = (dtype.itemsize for dtype in self.dtypes)
        only_read = sum(
            size for buffer, size in zip(self.chain.buffers, state, strict=True) if buffer.name in READ_ONLY
        )
        return 2 * weight + gradient + 2 * sum(state) - only_read

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
    "Adam-amsgrad": (fastreg.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "AdamW-cautious": (fastreg.AdamW, {"decay": "cautious"}),
}
READ_ONLY = ("l2_sp_start",)
"""Buffers that a step does not write."""

STORAGES = {
    "fp32": (torch.float32, "stochastic", None),
    "mixed": (torch.bfloat16, "stochastic", torch.float32),
    "bf16": (torch.bfloat16, "stochastic", None),
    "remainder": (torch.bfloat16, "remainder", None),
}
"""Weights and gradients, how bf16 is rounded, and the dtype of the state if it is another."""

# Instructions per parameter on sm_90, for each of the storages.
BUDGETS = {
    "AdamW": (30, 50.5, 49.5, 42.5),
    "clip+AdamW": (31.5, 52, 50.5, 43),
    "clip+AdamW+EMA": (35.5, 57, 57, 48),
    "clip+noise+AdamW+EMA": (80, 102, 102.5, 94.5),
    "SGD": (9.5, 26, 26, 17),
    "SGD-momentum": (13.5, 32.5, 31.5, 25),
    "SGD-nesterov": (16.5, 35, 33.5, 27),
    "Lion": (20, 38, 37, 30.5),
    "Adam-amsgrad": (33, 55, 53.5, 45),
    "AdamW-cautious+L1": (37.5, 58, 56.5, 49.5),
    "adaptive+SGD-momentum": (54, 73.5, 71, 64),
    "value+relative+L2SP+AdamW": (82, 104, 102.5, 97),
}


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
        "adaptive": fastreg.AdaptiveClip(),
        "value": fastreg.ClipValue(VALUE),
        "noise": fastreg.GradientNoise(STD),
        "relative": fastreg.GradientNoise(STD, relative=True),
        "L2SP": fastreg.L2SP(STRENGTH),
        "L1": fastreg.L1(STRENGTH),
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
    dtype, bf16, state_dtype = STORAGES[storage]
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
    made = optimizer(name, [parameter], bf16=bf16, state_dtype=state_dtype)
    chain = made.chain(made.param_groups[0], dtype)
    held = [made.buffer_dtype(chain, buffer, parameter) for buffer in chain.buffers]
    return Shipped(name, storage, chain, (dtype, dtype, *held), budget)
