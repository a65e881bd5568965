"""Regularizers that go into an optimizer's pass: `regularizers=[ClipNorm(1.0), EMA(0.999)]`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..chain import Buffer, Stage
from ..multi_tensor import Batch, clip_factor, combine
from ..random import Purpose, key
from ..reference import regularizers as reference
from ..reference.step import scalar_dtype
from .piece import Phase, Piece
from .placement import Shards


class ClipNorm(Piece):
    """Global gradient norm clipping: g ← g · min(max_norm / (‖g‖ + 1e-6), 1) over all groups.

    The same factor as `torch.nn.utils.clip_grad_norm_`, applied in registers: `.grad` keeps its contents.
    The norm before clipping is `optimizer.grad_norm`.

    Args:
        max_norm: Largest L2 norm of all gradients together; > 0, may be infinite (then it only measures).

    Raises:
        ValueError: If max_norm is not positive.

    Reference:
        Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural networks".
    """

    phase = Phase.CLIP
    _stage = Stage("regularizers.clip", reference.clip, scalars=("factor",))

    def __init__(self, max_norm: float) -> None:
        if not max_norm > 0:
            raise ValueError(f"max_norm must be > 0, got {max_norm=}")
        self.max_norm = float(max_norm)
        self._results: dict[torch.device, Tensor] = {}  # Σ g², norm, factor
        self._limits: dict[torch.device, tuple[float, Tensor]] = {}

    @property
    def norm(self) -> Tensor | None:
        """The norm at the latest step: 0-d, float64, on the device of the first parameters; `None` before."""
        return next((result[1].clone() for result in self._results.values()), None)

    def stage(self, group: dict[str, Any]) -> Stage:
        """Always the same."""
        return self._stage

    def scalars(self, device: torch.device) -> tuple[Tensor, ...]:
        """The factor."""
        return (self._result(device)[2],)

    def prepare(self, batches: Sequence[tuple[Batch, Shards | None]]) -> None:
        """One norm over everything: over devices by copying a scalar, over shards by summing one."""
        parts: dict[tuple[torch.device, Shards | None], list[Batch]] = {}
        for batch, shards in batches:
            parts.setdefault((batch.device, shards), []).append(batch)
        measured = {
            (device, shards): clip_factor(part, self._limit(device))
            for (device, shards), part in parts.items()
        }
        (home, shards), result = next(iter(measured.items()))
        if len(measured) > 1 or shards is not None:
            squares = []
            for (_, shards), part in measured.items():
                square = part[0].clone()
                if shards is not None:
                    shards.all_reduce(square)
                squares.append(square.to(home))
            result = combine(squares, self._limit(home))
        for device in {device for device, _ in measured}:
            self._result(device).copy_(result, non_blocking=True)

    def _result(self, device: torch.device) -> Tensor:
        if device not in self._results:
            self._results[device] = torch.zeros(3, dtype=scalar_dtype(device), device=device)
        return self._results[device]

    def _limit(self, device: torch.device) -> Tensor:
        """`max_norm`, which may be changed between steps, on the device."""
        if device not in self._limits or self._limits[device][0] != self.max_norm:
            limit = torch.tensor(self.max_norm, dtype=scalar_dtype(device), device=device)
            self._limits[device] = self.max_norm, limit
        return self._limits[device][1]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles measure anew."""
        return {**vars(self), "_results": {}, "_limits": {}}


class GradientNoise(Piece):
    """Adds Gaussian noise to the gradient after clipping: g ← g + std · N(0, 1).

    The noise is a function of the optimizer's `seed`, the position of the parameter in the optimizer, its
    step count and the element index: the same on every backend and for every sharding.  Replicas that hold
    whole copies of a parameter (DDP) must be given the same `seed`.

    Args:
        std: Standard deviation, in units of the gradient; ≥ 0.

    Raises:
        ValueError: If std is negative or not finite.

    Reference:
        Neelakantan et al. 2015, "Adding gradient noise improves learning for very deep networks".
    """

    phase = Phase.NOISE
    _stage = Stage("regularizers.gradient_noise", reference.gradient_noise, words=("key",), numbers=1)

    def __init__(self, std: float) -> None:
        if not 0 <= std < math.inf:
            raise ValueError(f"std must be finite and >= 0, got {std=}")
        self.std = float(std)

    def stage(self, group: dict[str, Any]) -> Stage:
        """Always the same."""
        return self._stage

    def numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """The standard deviation."""
        return (self.std,)

    def words(self, seed: int) -> tuple[int, ...]:
        """The key."""
        return (key(seed, Purpose.GRADIENT_NOISE),)


class EMA(Piece):
    """Exponential moving average of the weights: average ← average + (1 - decay)(p - average).

    Kept in float32 (float64 for float64 parameters) under `name` in the state of each parameter; starts as
    the parameter before its first step.  `with optimizer.averaged():` evaluates with it.

    Args:
        decay: Share of the average that is kept at each step; 0 ≤ decay < 1.
        name: Key of the average, to tell several apart.

    Raises:
        ValueError: If decay is outside [0, 1).

    Reference:
        Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging".
    """

    phase = Phase.AVERAGE

    def __init__(self, decay: float, name: str = "ema") -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay=}")
        self.decay, self.name = float(decay), name
        buffers = (Buffer(name, "compute", "parameter"),)
        self._stage = Stage("regularizers.ema", reference.ema, buffers, numbers=1)

    def stage(self, group: dict[str, Any]) -> Stage:
        """The average is its one buffer."""
        return self._stage

    def numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """The weight of the new parameter."""
        return (1 - self.decay,)
