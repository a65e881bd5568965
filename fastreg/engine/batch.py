"""A batch of parameters that take one step together, and what to measure of their gradients."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.units import UnitLayout
from ..runtime import backend
from .stage import Chain
from .table import Table, Uploaded


@dataclass
class Batch:
    """Parameters that take one step together: same device, same dtypes, same chain.

    Parameters and buffers are dense, and every gradient and buffer has the memory layout of its parameter.

    Args:
        chain: What is done to each.
        parameters: The local tensors, `n` of them.
        gradients: Likewise; only read.
        buffers: For each buffer of the chain, `n` tensors.
        device_scalars: For each scalar of the chain, a float64 tensor on the device, 0-d or `[n]`.
        rng_keys: For each word of the chain, an integer for all.
        firsts: Global index of the first element of each.
        streams: Random stream of each.
        rows: Which row of `steps` and `step_scalars` is whose.
        steps: Step count of each row; a tensor where the device counts.
        step_scalars: The numbers of the chain, for each row; where the device counts, a tensor.
        places: Where the units of each lie, for chains that have `units`.
        copies: Pairs of a tensor and the one of `parameters` to copy into it after the step.
        skip: float64 `[1]` on the device; not 0: the step does nothing.
        table: What the former batch of the same parameters left on the device.
        memory: `memory` of parameters and buffers, where that is known.
    """

    chain: Chain
    parameters: list[Tensor]
    gradients: list[Tensor]
    buffers: list[list[Tensor]]
    device_scalars: list[Tensor]
    rng_keys: list[int]
    firsts: list[int]
    streams: list[int]
    rows: list[int]
    steps: list[int] | Tensor
    step_scalars: list[list[float]] | Tensor
    places: list[UnitLayout] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    skip: Tensor | None = None
    table: Table = field(default_factory=Table)
    memory: list[list[int]] | None = None
    uploaded: Uploaded | None = None

    def unit(self, name: str) -> Tensor:
        """What the chain reads as `name`, an element for each unit of each parameter; kept by the table."""
        return self.table.units_of(self)[self.chain.units.index(name)]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.parameters[0].device

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of parameter, gradient and buffers."""
        return tuple(tensors[0].dtype for tensors in (self.parameters, self.gradients, *self.buffers))

    @functools.cached_property
    def backend(self) -> backend.Backend:
        """What runs this batch."""
        sizes = self.memory[1] if self.memory else map(Tensor.numel, self.parameters)
        return backend.resolve(self.device, sum(sizes))


class NormSpec(NamedTuple):
    """What to take the norm of: the gradient after the first stages of the chains.

    Args:
        stages: How many stages run before.
        momentum: Measure the momentum instead, as the stage that returns it hands it on.
        largest: Measure max |u| instead of √Σ u².
        absolute: The total is Σ |u| instead of Σ u²; there is no norm then.
    """

    stages: int = 0
    momentum: bool = False
    largest: bool = False
    absolute: bool = False

    def of(self, chain: Chain) -> int:
        """How many stages of a chain run before."""
        if self.momentum:
            return 1 + next(i for i, stage in enumerate(chain.stages) if stage.momentum)
        return self.stages


GRADIENT = NormSpec()


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie in memory: a `[n]` view."""
    return tensor if tensor.dim() == 1 else tensor.as_strided((tensor.numel(),), (1,))
