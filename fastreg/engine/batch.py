"""A batch of parameters that take one step together, and which norm to measure of their gradients."""

import functools
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..reference.step import compute_dtype
from ..reference.units import UnitLayout
from ..runtime import backend
from .layout import Shards
from .stage import Chain
from .table import Table


@dataclass
class Batch:
    """Parameters that take one step together: same device, same dtypes, same chain.

    Parameters and buffers are dense, and every gradient and buffer has the memory layout of its parameter.

    Args:
        chain: The stages that run over each.
        parameters: The local tensors, `n` of them.
        gradients: The gradients of these; only read.
        buffers: For each buffer of the chain, `n` tensors.
        device_scalars: For each device scalar of the chain, a float64 tensor on the device, 0-d or `[n]`.
        rng_keys: For each random key of the chain, an integer for all parameters.
        firsts: Global index of the first element of each.
        streams: Random stream of each.
        rows: Row of `steps` and `step_scalars` of each.
        steps: Step count of each row; a tensor where the device counts.
        step_scalars: The step scalars of the chain, for each row; a tensor where the device counts.
        unit_layouts: Where the units of each lie, for chains that have `units`.
        copies: Pairs of a tensor and the one of `parameters` to copy into it after the step.
        skip: float64 `[1]` on the device; not 0: the step does nothing.
        table: The kernel arguments on the device, kept from step to step.
        memory: What `table.memory` returns for parameters and buffers; `None` where they may move.
        uploaded: Whether the table holds the arguments of this step.
        shards: Which processes hold the other parts of the parameters, if they are sharded.
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
    unit_layouts: list[UnitLayout] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    skip: Tensor | None = None
    table: Table = field(default_factory=Table)
    memory: list[list[int]] | None = None
    uploaded: bool = False
    shards: Shards | None = None

    def unit(self, name: str) -> Tensor:
        """Returns the values that the chain reads as `name`, one for each unit of each parameter."""
        return self.table.units_of(self)[self.chain.units.index(name)]

    @functools.cached_property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.parameters[0].device

    @functools.cached_property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of parameter, gradient and buffers."""
        return tuple(tensors[0].dtype for tensors in (self.parameters, self.gradients, *self.buffers))

    @functools.cached_property
    def compute(self) -> torch.dtype:
        """The dtype in which stages compute."""
        return compute_dtype(self.parameters[0].dtype)

    @functools.cached_property
    def backend(self) -> backend.Backend:
        """The backend that runs this batch."""
        sizes = self.memory[1] if self.memory else map(Tensor.numel, self.parameters)
        return backend.resolve(self.device, sum(sizes))


class NormSpec(NamedTuple):
    """The norm to measure: of the gradient after the first stages of the chains.

    Args:
        stages: How many stages run before; for `"momentum"`, all up to the one that returns it.
        kind: √Σ u² for `"l2"`, max |u| for `"largest"`, the total Σ |u| (and no norm) for `"absolute"`;
            `"momentum"`: √Σ m² of the momentum that the stage with `momentum` returns.
    """

    stages: int = 0
    kind: Literal["l2", "largest", "absolute", "momentum"] = "l2"

    def num_stages(self, chain: Chain) -> int:
        """Returns how many stages of a chain run before."""
        if self.kind == "momentum":
            return 1 + next(i for i, stage in enumerate(chain.stages) if stage.momentum)
        return self.stages


def flat(tensor: Tensor) -> Tensor:
    """Returns the elements of a dense tensor in the order in which they lie in memory: a `[n]` view."""
    return tensor if tensor.dim() == 1 else tensor.as_strided((tensor.numel(),), (1,))
