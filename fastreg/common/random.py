"""Derives the keys of all random numbers from a base seed.

A key is a 64-bit seed derived from (base seed, purpose), so that gradient noise, rounding and others never
share bits.  The numbers drawn with a key depend on (stream, step, element index) alone: see
`fastreg.reference.random`.
"""

import functools
import itertools
from enum import IntEnum

import torch

from ..reference.random import philox
from .validation import check_int

_instances = itertools.count()


class Purpose(IntEnum):
    """The purpose of random numbers; the values are part of the keys and never change."""

    INSTANCE = 0
    GRADIENT_NOISE = 1
    STOCHASTIC_ROUNDING = 2
    PRIVACY = 3
    DROPOUT = 4
    PERTURBATION = 5
    WEIGHT_NOISE = 6


@functools.cache
def key(seed: int, purpose: Purpose, instance: int = 0) -> int:
    """Returns the 64-bit key, as a signed integer, for one purpose under a base seed of at most 64 bits.

    Negative seeds count as their two's complement. Instances tell users with the same purpose apart. Raises
    `ValueError` for larger seeds.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {seed=}")
    words = int(purpose), instance & 0xFFFFFFFF, instance >> 32, 0
    counter = tuple(torch.tensor(word, device="cpu") for word in words)
    low, high, *_ = (
        int(word) for word in philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF), 10)
    )
    unsigned = low | high << 32
    return unsigned - 2**64 if unsigned >= 2**63 else unsigned


def base_seed(seed: int | None) -> int:
    """Returns a base seed; for `None` one from `torch.initial_seed()` and a counter.

    Raises `ValueError` for anything but a whole number of at most 64 bits.
    """
    if seed is None:
        return key(torch.initial_seed(), Purpose.INSTANCE, next(_instances))
    seed = check_int("seed", seed, -(2**63))
    key(seed, Purpose.INSTANCE)  # refuses a seed that does not fit
    return seed
