"""A model of averaged weights beside the one that is trained: torch's `AveragedModel`, in one pass.

Where an average is held:

    float32, float64, complex   in the parameter of `.module`
    bfloat16, float16           in `.averages`, float32; `.module` has it rounded
    FSDP2                       in `.averages`, as shards; `.module` is the trained model
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from ..reference.step import compute_dtype
from . import placement
from .averaging import Averaging

NARROW = (torch.bfloat16, torch.float16)
AVERAGED = (*NARROW, torch.float32, torch.float64, torch.complex64, torch.complex128)
"""Tensors of other dtypes are copied."""

AvgFn = Callable[[Tensor, Tensor, Any], Tensor]
MultiAvgFn = Callable[[Any, Any, Any], None]


class ExponentialAverage:
    """What `get_ema_multi_avg_fn` returns.

    Args:
        decay: Share of the average that is kept at each update; 0 ≤ decay ≤ 1.

    Raises:
        ValueError: For a decay out of range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay=}")
        self.decay = float(decay)

    def __call__(self, averages: Sequence[Tensor], weights: Sequence[Tensor], n_averaged: Any) -> None:
        """Update averages in place, as torch's function does; `AveragedModel` has a faster way.

        Args:
            averages: Of one device and dtype.
            weights: Tensors of the same shapes, device and dtype.
            n_averaged: Not used.
        """
        swa_utils.get_ema_multi_avg_fn(self.decay)(list(averages), list(weights), n_averaged)

    def __repr__(self) -> str:
        return f"get_ema_multi_avg_fn({self.decay!r})"


def get_ema_multi_avg_fn(decay: float = 0.999) -> ExponentialAverage:
    """An exponential moving average for `AveragedModel`: average ← average + (1 - decay)(p - average).

    It can be pickled, and given to torch's `AveragedModel` as well.

    Args:
        decay: Share of the average that is kept at each update; 0 ≤ decay ≤ 1.

    Raises:
        ValueError: For a decay out of range.

    Reference:
        Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging".
    """
    return ExponentialAverage(decay)


class _Entry(NamedTuple):
    """A parameter or buffer: where its average is, where that is rounded to, and whether it is one."""

    own: Tensor
    rounded: Tensor | None
    averaged: bool


class _Tree(nn.Module):
    """Tensors under the names that they have in a model; casts leave their dtypes alone."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Tree:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class AveragedModel(swa_utils.AveragedModel):
    """Averages of the weights of a model, of equal weight (SWA) unless told otherwise.

    A drop-in for `torch.optim.swa_utils.AveragedModel`: an update with equal weights, or with
    `fastreg.get_ema_multi_avg_fn`, is one pass over memory.  Averages of bfloat16 and float16 weights are held
    in float32, so that they do not stall; `.module` keeps the dtypes of the model and holds them rounded.
    The state dict has the float32 averages under `averages`; without them, as saved by torch, averages start
    from `module`.  Parameters and buffers that are not floating point are copied.

    A model sharded by FSDP2 (`fully_shard`) cannot be copied.  `.module` is then the given model, averages are
    kept as shards, and a call runs the model with averages in place of its weights, without gradients;
    afterwards it has its weights again, bit for bit.

    The first update copies.

    Args:
        model: The model that is trained; shard it first.
        device: Where to keep the averages; by default where the model is.
        avg_fn: `(average, weight, n_averaged) -> average`, for one tensor.
        multi_avg_fn: `(averages, weights, n_averaged)`, for lists of tensors of one device and dtype; updates in
            place.
        use_buffers: Average buffers as well, instead of copying them.

    Raises:
        TypeError: If the model is no module, or a function cannot be called.
        ValueError: If both functions are given, or a device for a sharded model.

    Reference:
        Izmailov et al. 2018, "Averaging weights leads to wider optima and better generalization".
    """

    def __init__(
        self, model: nn.Module, device: int | str | torch.device | None = None, avg_fn: AvgFn | None = None,
        multi_avg_fn: MultiAvgFn | None = None, use_buffers: bool = False,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
        for name, function in (("avg_fn", avg_fn), ("multi_avg_fn", multi_avg_fn)):
            if function is not None and not callable(function):
                raise TypeError(
                    f"{name} must be callable such as get_ema_multi_avg_fn(0.999), got {function!r}"
                )
        if avg_fn is not None and multi_avg_fn is not None:
            raise ValueError(
                f"only one of avg_fn and multi_avg_fn may be given, got {avg_fn=}, {multi_avg_fn=}"
            )
        sharded = bool(_fsdp_modules(model))
        if sharded and device is not None:
            raise ValueError(
                f"averages of a model sharded by FSDP2 stay where its shards are, got {device=}; leave it out"
            )
        if sharded:
            nn.Module.__init__(self)
            self.module, self.avg_fn, self.multi_avg_fn = model, avg_fn, multi_avg_fn
            self.use_buffers = use_buffers
            self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long))
        else:
            super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers)  # type: ignore[arg-type]
        self._sharded, self._inside = sharded, False
        self.averages = _Tree()
        self._build()

    # Updates --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights of the model into the averages.

        Args:
            model: The model that is trained; its parameters and buffers have the shapes of the averages.

        Raises:
            RuntimeError: While averages are swapped in.
            ValueError: If the model does not fit.
        """
        if self._inside:
            raise RuntimeError("update_parameters() while averages are swapped in would average them again")
        _reshard(model)
        if self._key != self._current_key():
            self._build()
        new = [*model.parameters(), *model.buffers()]
        self._check(new)
        pairs = [(entry, weight.detach()) for entry, weight in zip(self._entries, new, strict=True)]
        weights = [_weight(entry.own, weight) for entry, weight in pairs if entry.averaged]
        done = int(self.n_averaged)
        if self.avg_fn is None and (
            self.multi_avg_fn is None or isinstance(self.multi_avg_fn, ExponentialAverage)
        ):
            decay = self.multi_avg_fn.decay if self.multi_avg_fn is not None else done / (done + 1)
            self._averaging.run(
                weights, 1 / (done + 1) if self.multi_avg_fn is None or not done else 1 - decay
            )
        else:
            self._call(weights, done)
        for entry, weight in pairs:
            if not entry.averaged:
                entry.own.copy_(weight)
        self.n_averaged += 1
