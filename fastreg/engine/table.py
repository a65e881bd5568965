"""Puts the kernel arguments of a batch into device memory: a table of addresses and integers.

The static part (`Table`) is uploaded when it changes. Gradients move every step, so their addresses travel
with the step counts and scalars in one small copy from pinned memory. No step waits for the device.
"""

from __future__ import annotations

from array import array
from itertools import chain as chained
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime.device import capturing, keep, stream, upload

if TYPE_CHECKING:
    from .batch import Batch

UNIT = 0
"""For `Table.work`: a program works on one unit, such as a row of a matrix."""
_CODES = {torch.float32: "f", torch.float64: "d"}


class Table:
    """The kernel arguments of a batch on the device, static ones kept while none of them changes.

    It belongs to the stream that made it: on another it is made anew.  What is uploaded while a CUDA graph is
    captured is there once the graph is replayed, so no later step reads it.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.key: Any = None
        self.rows: Tensor
        self.gradients: Tensor  # int64[n], addresses
        self.steps: Tensor  # int64[rows]
        self.step_scalars: Tensor  # compute dtype, [rows · step scalars]
        self.units: list[Tensor] = []
        self.sizes: list[int] = []
        self._unit_counts: list[int] = []
        self._work: dict[int, Tensor] = {}
        self._stream: Any = None
        self._captured = False

    def refresh(self, batch: Batch) -> None:
        """Uploads addresses and integers if any differs from last time, and work lists if a size does."""
        here, captured = stream(batch.device), capturing(batch.device)
        if self._captured or (here != self._stream and not captured):
            self._reset()
        known = batch.memory or memory(batch.parameters, batch.buffers)
        device_scalars = [(s.data_ptr(), s.element_size() if s.dim() else 0) for s in batch.device_scalars]
        integers = batch.firsts, batch.streams, batch.rows, batch.unit_layouts, batch.rng_keys
        current = known, integers, device_scalars
        if current == self.key:  # at once for lists that are the same ones
            if captured:
                keep(self.rows, *self.units, *self._work.values())
            return
        if captured:
            self._reset()
        self.key, self._stream, self._captured = current, here, captured
        addresses, sizes, *buffers = known
        n = len(addresses)
        columns = [
            addresses, sizes, batch.firsts, batch.streams, batch.rows, *buffers,
            *([start + i * stride for i in range(n)] for start, stride in device_scalars),
            *([key] * n for key in batch.rng_keys),
        ]  # fmt: skip
        if batch.chain.units:
            self._unit_counts = counts = [units.count for units in batch.unit_layouts]
            for values in self.units_of(batch):
                columns.append(list(map(Tensor.data_ptr, values.split(counts))))
            columns += [[units.stride for units in batch.unit_layouts], counts]
        self.rows = upload(_host(columns, torch.int64).T.contiguous(), batch.device)
        if sizes != self.sizes:
            self.sizes, self._work = sizes, {}

    def work(self, block: int) -> Tensor:
        """Returns (tensor, block of it) for each program, int32, where programs work on `block` elements.

        With a block of `UNIT`, a program works on a unit. The list is made anew in every captured graph.
        """
        if block in self._work:
            return self._work[block]
        counts = self._unit_counts if block == UNIT else [-(-size // block) for size in self.sizes]
        work = upload(work_list(counts), self.rows.device)
        if self._captured or not capturing(work.device):
            self._work[block] = work
        return work

    def units_of(self, batch: Batch) -> list[Tensor]:
        """Returns for each name of `chain.units` an element for each unit of each parameter."""
        if batch.chain.units and not self.units:
            total = sum(units.count for units in batch.unit_layouts)
            ones = torch.ones(total, dtype=batch.compute, device=batch.device)
            self.units = [ones.clone() for _ in batch.chain.units]
        return self.units


def work_list(counts: list[int]) -> Tensor:
    """Returns (tensor, number among its programs) for each program, int32, from the number per tensor."""
    programs = _host(counts, torch.int64)
    tensor = torch.arange(len(counts), device="cpu").repeat_interleave(programs)
    within = torch.arange(len(tensor), device="cpu") - (programs.cumsum(0) - programs)[tensor]
    return torch.stack((tensor, within), 1).int()


def upload_changes(batch: Batch) -> Table:
    """Brings everything but the gradients' contents to the device, once per step; returns the table."""
    table = batch.table
    if batch.uploaded:
        return table
    table.refresh(batch)
    # Each part starts at a multiple of 16 bytes: Triton compiles anew for a pointer that does not.
    gradients = list(map(Tensor.data_ptr, batch.gradients))
    integers = gradients + [0] * (len(gradients) % 2)
    if isinstance(batch.step_scalars, Tensor):
        table.gradients = upload(_host(integers, torch.int64), batch.device)
        table.steps, table.step_scalars = torch.as_tensor(batch.steps), batch.step_scalars
    else:
        first = len(integers)
        integers += [*batch.steps, *[0] * (len(batch.steps) % 2)]
        compute = batch.compute
        step_scalars = array(_CODES[compute], chained.from_iterable(batch.step_scalars))
        host = torch.frombuffer(bytearray(array("q", integers)) + step_scalars.tobytes(), dtype=torch.uint8)
        data = upload(host, batch.device)
        table.gradients = data[: 8 * len(integers)].view(torch.int64)
        table.steps, table.step_scalars = table.gradients[first:], data[8 * len(integers) :].view(compute)
    batch.uploaded = True
    return table


def _host(values: list[Any], dtype: torch.dtype) -> Tensor:
    """Returns the values as a tensor in host memory, whatever the default device is."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def memory(parameters: list[Tensor], buffers: list[list[Tensor]]) -> list[list[int]]:
    """Returns addresses and sizes of parameters, and the addresses of each buffer: `n` numbers each."""
    return [
        list(map(Tensor.data_ptr, parameters)),
        list(map(Tensor.numel, parameters)),
        *(list(map(Tensor.data_ptr, buffer)) for buffer in buffers),
    ]
