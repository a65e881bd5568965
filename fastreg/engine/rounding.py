"""Writes 16-bit weights back without losing small updates, such as weight decay."""

from typing import Any

import torch

from ..common.random import Purpose, key
from ..common.validation import check_choice
from ..reference import storage as reference
from .component import Component, Phase
from .stage import Buffer, Storage

MODES = ("stochastic", "remainder", "nearest")


class Rounding(Component):
    """The storage of bfloat16 and float16 weights.

    Rounding at random does not depend on the optimizer's seed: replicas of a weight (DDP), whose processes
    may well be seeded differently, would drift apart.

    Args:
        bf16: `"stochastic"` rounds at random, right on average; `"remainder"` keeps 16 more bits of every
            bfloat16 in the state, together an exact float32; `"nearest"` rounds as torch does.
        purpose: Selects the stream of random bits.

    Raises:
        ValueError: If there is no such mode.
    """

    phase = Phase.DESCEND
    _bfloat16 = Storage(
        ("storage.read_plain", "storage.write_bfloat16"), write=reference.write_bfloat16, rng_keys=("key",)
    )
    _float16 = Storage(
        ("storage.read_plain", "storage.write_float16"), write=reference.write_float16, rng_keys=("key",)
    )
    _split = Storage(
        ("storage.read_split", "storage.write_split"), reference.read_split, reference.write_split,
        sources=("parameter", "remainder"), targets=("parameter", "remainder"),
        buffers=(Buffer("remainder", torch.int16),),
    )  # fmt: skip

    def __init__(self, bf16: str, purpose: Purpose = Purpose.STOCHASTIC_ROUNDING) -> None:
        check_choice("bf16", bf16, MODES)
        self.bf16, self._purpose = bf16, purpose

    def storage(self, group: dict[str, Any], dtype: torch.dtype) -> Storage | None:
        """Returns the storage of 16-bit weights; `None` for wider ones."""
        if self.bf16 == "nearest":
            return None
        if dtype == torch.bfloat16:
            return self._split if self.bf16 == "remainder" else self._bfloat16
        return self._float16 if dtype == torch.float16 else None

    def storage_rng_keys(self, seed: int) -> tuple[int, ...]:
        """Returns the key, the same for all optimizers."""
        return (key(0, self._purpose),)
