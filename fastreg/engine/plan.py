"""Plans: the batches of a step, and the step counts, kept while the same is done to the same parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress, repeat
from operator import is_, is_not, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..reference.norm import Measured
from . import layout
from .batch import Batch
from .stage import Chain
from .table import memory

if TYPE_CHECKING:
    from .component import Component


Variant = tuple[bool, ...]
"""Whether the weight is read from `BACKUP`, then for each periodic component whether its stage takes part."""


class Operands(NamedTuple):
    """The parameters that a step is for, as lists of equal length."""

    parameters: list[Tensor]
    gradients: list[Any]
    groups: list[int]
    streams: list[int]

    def only(self, wanted: Iterable[bool]) -> Operands:
        """Returns the operands that are marked in a list of the same length."""
        wanted = list(wanted)
        return Operands(*(list(compress(column, wanted)) for column in self))

    def with_gradient(self) -> Operands:
        """Returns the operands whose gradient is not `None`."""
        present = list(map(is_not, self.gradients, repeat(None)))
        return self if all(present) else self.only(present)


@dataclass
class PlannedBatch(Batch):
    """A batch that a plan keeps from step to step, with lists of equal length.

    Between steps it holds addresses, not tensors: state may be replaced or moved off the device, and
    gradients may be freed.
    """

    capturable: bool = False
    variant: Variant = (False,)
    positions: list[int] = field(default_factory=list)  # among the parameters of this step
    groups: dict[int, int] = field(default_factory=dict)  # groups of these parameters: 0 for the first one
    owners: list[int] = field(default_factory=list)  # to which of these groups each parameter belongs
    strides: list[tuple[int, ...]] = field(default_factory=list)
    addresses: list[tuple[list[int], list[int]]] = field(default_factory=list)  # and sizes, for each buffer
    dense: bool = True  # no DTensors, all contiguous
    scalar_components: list[Component] = field(default_factory=list)  # whose stages take step scalars
    key_components: list[Component] = field(default_factory=list)  # whose stages take random keys
    storages: list[Component] = field(default_factory=list)  # whose storage takes random keys
    names: list[str] = field(default_factory=list)  # of the buffers in states

    def select(self, values: list[Any]) -> list[Any]:
        """Returns the values of this batch from a list with one for each parameter of the step."""
        return values if len(values) == len(self.positions) else [values[i] for i in self.positions]

    def gather(self, states: list[dict[str, Any]]) -> None:
        """Collects the local tensors of each buffer; a missing one is a `KeyError`."""
        states = self.select(states)
        self.buffers = [list(map(itemgetter(name), states)) for name in self.names]
        if not self.dense:
            self.buffers = [list(map(layout.local, buffer)) for buffer in self.buffers]

    def release(self) -> None:
        """Drops the tensors of a step."""
        self.parameters, self.gradients, self.buffers, self.copies = [], [], [], []
        self.skip, self.uploaded = None, False


@dataclass
class Plan:
    """The batches of a step, which components get in `prepare` and `finish`.

    It is kept as long as steps do the same to the same parameters.

    Args:
        variants: The variant of all parameters, or of each.
        batches: The parameters that have gradients.
        elements: How many elements they have, shards elsewhere included.
        options: Options of the groups, for which the chains have been checked.
        tensors: The local tensors of the parameters. These and all that follows are dropped after a step.
        states: Their states.
        absent: Local tensors and states of the other parameters that have been stepped before.
        measured: The norm of all gradients together, on each device, if any component needs it.
    """

    variants: Variant | list[Variant]
    batches: list[PlannedBatch]
    elements: int
    options: list[list[Any]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    absent: list[tuple[Tensor, dict[str, Any]]] = field(default_factory=list)
    measured: dict[torch.device, Measured] = field(default_factory=dict)

    @property
    def devices(self) -> list[torch.device]:
        """The devices of the batches, each once."""
        return list(dict.fromkeys(batch.device for batch in self.batches))

    def gather(self, states: list[dict[str, Any]]) -> bool:
        """Collects all buffers; returns whether each is at the same address as when the plan was made."""
        try:
            for batch in self.batches:
                batch.gather(states)
        except KeyError:
            return False
        return all(buffer_addresses(batch.buffers) == batch.addresses for batch in self.batches)

    def same_options(self, options: list[list[Any]]) -> bool:
        """Returns whether all options of all groups are the same objects as when chains were checked."""
        return list(map(len, options)) == list(map(len, self.options)) and all(
            all(map(is_, new, old)) for new, old in zip(options, self.options, strict=True)
        )

    def release(self) -> None:
        """Drops all that belongs to one step."""
        self.tensors, self.states, self.absent, self.measured = [], [], [], {}
        for batch in self.batches:
            batch.release()


def sort_into_batches(
    parameters: Sequence[Tensor], tensors: list[Tensor], gradients: list[Tensor],
    states: list[dict[str, Any]], streams: Sequence[int],
    kinds: Sequence[tuple[int, torch.dtype, Variant]], chains: dict[Any, Chain], capturable: list[bool],
) -> list[PlannedBatch]:  # fmt: skip
    """Returns the batches of a step, one for each device, dtypes, chain, sharding, variant and step counter.

    Args:
        parameters: The parameters.
        tensors: Their local parts, of real numbers.
        gradients: The local parts of their gradients.
        states: Their states, with every buffer.
        streams: Their random streams.
        kinds: Group, dtype and variant of each.
        chains: The chain of each kind.
        capturable: For each group, whether the device counts its steps.
    """
    batches: dict[Any, PlannedBatch] = {}
    for i, (p, tensor, gradient, state, kind) in enumerate(
        zip(parameters, tensors, gradients, states, kinds, strict=True)
    ):
        group, _, variant = kind
        chain, shards = chains[kind], layout.shards(p)
        buffers = [layout.local(state[buffer.name]) for buffer in chain.buffers]
        dtypes = tuple(t.dtype for t in (tensor, gradient, *buffers))
        key = tensor.device, dtypes, chain, shards, capturable[group], variant
        batch = batches.get(key)
        if batch is None:
            batch = batches[key] = PlannedBatch(
                chain, [], [], [], [], [], [], [], [], [], [], shards=shards, capturable=capturable[group],
                variant=variant, names=[buffer.name for buffer in chain.buffers],
            )  # fmt: skip
            batch.device, batch.dtypes = tensor.device, dtypes
        batch.positions.append(i)
        batch.owners.append(batch.groups.setdefault(group, len(batch.groups)))
        batch.firsts.append(layout.first_element(p))
        batch.streams.append(streams[i])
        batch.strides.append(layout.dense_strides(tensor))
        if chain.units:
            batch.unit_layouts.append(layout.units(p, batch.strides[-1]))
        batch.dense &= tensor is p and tensor.is_contiguous()
    for batch in batches.values():
        batch.gather(states)
        batch.addresses = buffer_addresses(batch.buffers)
        if batch.dense:
            batch.memory = memory(batch.select(tensors), batch.buffers)
    return list(batches.values())


def buffer_addresses(buffers: list[list[Tensor]]) -> list[tuple[list[int], list[int]]]:
    """Returns address and size of each: an address alone may have been reused by another tensor."""
    return [(list(map(Tensor.data_ptr, buffer)), list(map(Tensor.numel, buffer))) for buffer in buffers]


class Counts:
    """The `state["step"]` of many parameters, as views of one tensor per device, which is counted up at once.

    Args:
        counts: The count of each parameter.
        devices: The device that counts for each (`capturable`); `None` where the host does.
    """

    def __init__(self, counts: list[float], devices: list[torch.device | None]) -> None:
        self._tensors = {
            device: torch.tensor(
                [c for c, other in zip(counts, devices, strict=True) if other == device],
                dtype=torch.float32, device=device or "cpu",
            )
            for device in dict.fromkeys([None, *devices])
        }  # fmt: skip
        self._host = self._tensors[None]
        views: dict[Any, Iterator[Tensor]] = {d: iter(t.unbind()) for d, t in self._tensors.items()}
        self.views = [next(views[device]) for device in devices]
        self._devices = devices

    def on_host(self) -> list[float]:
        """Returns the counts that the host keeps, whole numbers; 0 where a device keeps them."""
        counts = self._host.tolist()
        if len(self._tensors) == 1:
            return counts
        remaining = iter(counts)
        return [next(remaining) if device is None else 0.0 for device in self._devices]

    def add(self, flags: dict[torch.device, Tensor]) -> None:
        """Counts a step: on a device unless it is skipped there, on the host in any case."""
        for device, counts in self._tensors.items():
            counts.add_(1 - flags[device].float() if device in flags else 1)

    def take_back(self) -> None:
        """Takes back the host's latest count, because that step was skipped."""
        self._host.sub_(1)


class SkipStatus:
    """Whether a step was skipped: the device says so later, and the host first waits at the next step.

    Args:
        flag: `[1]`; not 0: skipped.
        counts: The counts to correct if it was.
        report: Whether a skipped step is an error.
    """

    def __init__(self, flag: Tensor, counts: Counts, report: bool) -> None:
        self._counts, self.report = counts, report
        self._skipped: bool | None = None
        self._flag, self._event = flag, None
        if flag.device.type == "cpu":
            self.skipped()
        elif flag.device.type == "cuda":
            self._flag = torch.empty(flag.shape, dtype=flag.dtype, device="cpu", pin_memory=True)
            self._flag.copy_(flag, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(flag.device))

    def skipped(self) -> bool:
        """Returns whether it was; waits for the device, and corrects the host's count the first time."""
        if self._skipped is None:
            if self._event is not None:
                self._event.synchronize()
            self._skipped = bool(self._flag.item())
            if self._skipped:
                self._counts.take_back()
        return self._skipped
