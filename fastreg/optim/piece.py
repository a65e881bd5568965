"""A piece: what an optimizer is made of.

A piece says which stage it puts into the chain, in which phase, and works out on the host, in double, the
numbers the stage needs this step.  What needs a reduction over gradients first does it in `prepare` and
leaves a device scalar for its stage to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ..chain import Stage, Storage
from ..multi_tensor import Batch
from .placement import Shards


class Phase(IntEnum):
    """The order of stages; the order in which regularizers are given matters only inside a phase."""

    CLIP = 0
    NOISE = 1
    PENALTY = 2
    RULE = 3
    DECAY = 4
    DESCEND = 5
    AVERAGE = 6


class Piece:
    """Base of update rules and regularizers.

    Subclasses set `phase` and override what they need, most of them `stage` and `numbers`.
    """

    phase: Phase

    def stage(self, group: dict[str, Any]) -> Stage | None:
        """The stage for the parameters of a group; may depend on what the group switches on."""
        return None

    def numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """The numbers of the stage at a step (the first is 1), as many as `stage.numbers`."""
        return ()

    def words(self, seed: int) -> tuple[int, ...]:
        """The integers of the stage, as many as `stage.words`, from the optimizer's seed."""
        return ()

    def scalars(self, device: torch.device) -> tuple[Tensor, ...]:
        """The device scalars of the stage, float64: the same tensors at every step, written by `prepare`."""
        return ()

    def prepare(self, batches: Sequence[tuple[Batch, Shards | None]]) -> None:
        """Called once per step before any parameter changes, with all gradients and how they are sharded."""

    def skip(self, device: torch.device) -> Tensor | None:
        """A float32 `[1]` flag on the device; where it is not 0 after `prepare`, the step does nothing."""
        return None

    def storage(self, group: dict[str, Any]) -> Storage | None:
        """How weights are stored, if not plainly."""
        return None

    def storage_words(self, seed: int) -> tuple[int, ...]:
        """The integers that writing takes, as many as `storage.words`."""
        return ()

    def __repr__(self) -> str:
        """As it would be written in code."""
        shown = ", ".join(
            f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_")
        )
        return f"{type(self).__name__}({shown})"


def floats(group: dict[str, Any], *names: str) -> tuple[float, ...]:
    """Hyper-parameters of a group as Python floats; a tensor on a device is waited for."""
    return tuple(float(group[name]) for name in names)
