"""The pass that updates the averages of an `AveragedModel`.

Its parameters are the averages, its "gradients" the weights.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine import layout
from ..engine.component import Component, Phase
from ..engine.multi_tensor_optimizer import MultiTensorOptimizer
from ..engine.stage import Buffer, Stage
from ..reference import regularizers as reference
from .weight_averages import dither


class _Averaged(Component):
    """Updates averages: average ← average + weight · (p - average)."""

    phase = Phase.RULE
    _stage = Stage("regularizers.averaged", reference.averaged, step_scalars=2)
    weight = 1.0
    updates = 0

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        # `AveragedModel` stores the count of updates.  With a weight of 0 averages do not move at all.
        return self.weight, dither(self.updates) if self.weight else 0.0


class _Rounded(Component):
    """Writes a narrow copy of the average."""

    phase = Phase.AVERAGE
    _stage = Stage("regularizers.rounded", reference.rounded, (Buffer("rounded"),))

    def stage(self, group: dict[str, Any]) -> Stage | None:
        return self._stage if group["rounded"] else None


class UpdateAverages(MultiTensorOptimizer):
    """Updates many averages, tensors or DTensors of any placement, in one pass.

    Where `rounded` has a tensor for an average, of its shape, it receives that in another dtype.
    """

    def __init__(self, averages: Sequence[Tensor], rounded: Sequence[Tensor | None]) -> None:
        self._averaged = _Averaged()
        self._set_components((self._averaged, _Rounded()), seed=0)
        # Element by element, it does not matter where a shard lies in the whole.
        shards = [local_part(average) for average in averages]
        copies = [None if copy is None else local_part(copy) for copy in rounded]
        fused = [_alike(average, copy) for average, copy in zip(shards, copies, strict=True)]
        entries = list(zip(shards, copies, fused, strict=True))
        self._copied = [(copy, a) for a, copy, in_pass in entries if copy is not None and not in_pass]
        self._in_pass = [(copy, a) for a, copy, in_pass in entries if copy is not None and in_pass]
        self._order = sorted(range(len(shards)), key=fused.__getitem__)
        super().__init__(
            [
                {"params": [a for a, _, in_pass in entries if in_pass is wanted], "rounded": wanted}
                for wanted in (False, True)
            ],
            {},
        )
        for copy, average in self._in_pass:
            self.state[average]["rounded"] = copy

    def run(self, weights: Sequence[Tensor], weight: float, updates: int) -> None:
        """Updates all averages, average ← average + weight · (p - average), and their rounded copies.

        The p in `weights` are sharded as the averages; a weight of 1 copies; `updates` were made before.
        """
        self._averaged.weight, self._averaged.updates = weight, updates
        self._run_step(self._operands([local_part(weights[i]) for i in self._order]))
        self.round(fused=False)

    @torch.no_grad()
    def round(self, fused: bool = True) -> None:
        """Rounds all averages again; without `fused`, only those that the pass does not round."""
        for copy, average in (*self._copied, *self._in_pass) if fused else self._copied:
            copy.copy_(average)
        if self._in_pass and not fused:
            # Written behind torch's back: what autograd saved of them is out of date.
            torch.autograd.graph.increment_version([copy for copy, _ in self._in_pass])


def local_part(tensor: Tensor) -> Tensor:
    """Returns the tensor itself, or the local part of a DTensor."""
    return tensor._local_tensor if layout.is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def _alike(average: Tensor, rounded: Tensor | None) -> bool:
    """Whether both lie in memory in the same order, as one pass over them needs."""
    return rounded is not None and layout.with_strides(rounded, layout.dense_strides(average)) is rounded
