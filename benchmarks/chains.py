"""The written list of chains that fastreg ships, for the code audit and the benchmarks.

Each row says what a step must move and what it may cost: bytes per parameter follow from the dtypes, the
instruction budgets are for sm_90 and are what keeps a step bound by memory rather than by issue.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

import fastreg
from fastreg.chain import Chain


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


def _regularizers(name: str) -> list[fastreg.Piece]:
    pieces = {"clip": fastreg.ClipNorm(1.0), "noise": fastreg.GradientNoise(0.01), "EMA": fastreg.EMA(0.999)}
    return [piece for key, piece in pieces.items() if key in name]


OPTIMIZERS = {
    "AdamW": lambda params, name: fastreg.AdamW(params, regularizers=_regularizers(name)),
    "SGD": lambda params, name: fastreg.SGD(params),
    "SGD-momentum": lambda params, name: fastreg.SGD(params, momentum=0.9),
    "SGD-nesterov": lambda params, name: fastreg.SGD(params, momentum=0.9, nesterov=True),
    "Lion": lambda params, name: fastreg.Lion(params),
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


def shipped() -> Iterator[Shipped]:
    """Every chain at every combination of dtypes."""
    for name, budgets in BUDGETS.items():
        optimizer = OPTIMIZERS[name.removesuffix("+EMA").split("+")[-1]](
            [torch.nn.Parameter(torch.zeros(1))], name
        )
        chain = optimizer.chain(optimizer.param_groups[0])
        for storage, budget in zip(STORAGES, budgets, strict=True):
            weight = torch.float32 if storage == "fp32" else torch.bfloat16
            state = {"parameter": torch.float32 if storage == "mixed" else weight, "compute": torch.float32}
            dtypes = (weight, weight, *(state.get(b.dtype, b.dtype) for b in chain.buffers))
            yield Shipped(name, storage, chain, dtypes, budget)
