"""Parameters that take a step together: same device, dtypes, chain and sharding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.units import UnitLayout
from . import layout
from .stage import Chain
from .table import Table, memory


class Variant(NamedTuple):
    """What a step does to a parameter this time, where that changes from step to step.

    Args:
        due: For each periodic component of the optimizer, whether its stage takes part.
        backup: Whether the weight comes from `BACKUP` in the state, not from the parameter.
    """

    due: tuple[bool, ...] = ()
    backup: bool = False


@dataclass
class Bucket:
    """What a step shares with the next one: lists of equal length, and a table on the device.

    It holds addresses, not state: state may be replaced or moved off the device between steps.
    """

    chain: Chain
    shards: layout.Shards | None
    capturable: bool
    variant: Variant
    dtypes: tuple[torch.dtype, ...]
    positions: list[int] = field(default_factory=list)  # among the parameters of this step
    groups: dict[int, int] = field(default_factory=dict)  # whose parameters these are: 0 for the first group
    owners: list[int] = field(default_factory=list)  # which of these groups each belongs to
    firsts: list[int] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    layouts: list[tuple[int, ...]] = field(default_factory=list)
    units: list[UnitLayout] = field(default_factory=list)
    places: list[tuple[list[int], list[int]]] = field(default_factory=list)  # for each buffer
    memory: list[list[int]] | None = None  # what `Table.refresh` reads of tensors that stay where they are
    plain: bool = True  # no DTensors, all contiguous
    table: Table = field(default_factory=Table)

    def own(self, every: list[Any]) -> list[Any]:
        """Of a list with something for every parameter of the step, what belongs to those of the bucket."""
        return every if len(every) == len(self.positions) else [every[i] for i in self.positions]

    def gather(self, states: list[dict[str, Any]]) -> list[list[Tensor]]:
        """For each buffer of the chain, the local tensors; a missing one is a `KeyError`."""
        own = self.own(states)
        buffers = [list(map(itemgetter(buffer.name), own)) for buffer in self.chain.buffers]
        return buffers if self.plain else [list(map(layout.local, buffer)) for buffer in buffers]


@dataclass
class Member:
    """A parameter of this step, and what decides into which bucket it goes."""

    parameter: Tensor
    tensor: Tensor  # its local part, of real numbers
    gradient: Tensor
    state: dict[str, Any]
    stream: int
    group: int
    capturable: bool
    variant: Variant
    chain: Chain


@dataclass
class Plan:
    """The buckets of a step that does the same to the same parameters as one before."""

    variants: Any
    buckets: list[Bucket]
    elements: int  # of all parameters, shards elsewhere included

    def gather(self, states: list[dict[str, Any]]) -> list[list[list[Tensor]]] | None:
        """What each bucket gathers, if every state tensor is where it was when the plan was made."""
        try:
            buffers = [bucket.gather(states) for bucket in self.buckets]
        except KeyError:
            return None
        return buffers if list(map(places, buffers)) == [bucket.places for bucket in self.buckets] else None


def sort(members: Sequence[Member]) -> list[Bucket]:
    """The buckets of a step."""
    buckets: dict[Any, Bucket] = {}
    for i, m in enumerate(members):
        held = (layout.local(m.state[buffer.name]) for buffer in m.chain.buffers)
        dtypes = tuple(t.dtype for t in (m.tensor, m.gradient, *held))
        shards = layout.shards(m.parameter)
        kind = m.tensor.device, dtypes, m.chain, shards, m.capturable, m.variant
        bucket = buckets.setdefault(kind, Bucket(m.chain, shards, m.capturable, m.variant, dtypes))
        bucket.positions.append(i)
        bucket.owners.append(bucket.groups.setdefault(m.group, len(bucket.groups)))
        bucket.firsts.append(layout.first_element(m.parameter))
        bucket.streams.append(m.stream)
        bucket.layouts.append(layout.layout(m.tensor))
        bucket.units.append(layout.units(m.parameter, bucket.layouts[-1]))
        bucket.plain &= m.tensor is m.parameter and m.tensor.is_contiguous()
    states = [m.state for m in members]
    for bucket in buckets.values():
        buffers = bucket.gather(states)
        bucket.places = places(buffers)
        if bucket.plain:
            bucket.memory = memory(bucket.own([m.tensor for m in members]), buffers)
    return list(buckets.values())


def places(buffers: list[list[Tensor]]) -> list[tuple[list[int], list[int]]]:
    """Address and size of each: an address alone may have been given to another tensor meanwhile."""
    return [(list(map(Tensor.data_ptr, buffer)), list(map(Tensor.numel, buffer))) for buffer in buffers]
