"""Puts the kernel arguments of a batch into device memory: a table of addresses and integers.

The static part (`Table`) is uploaded when it changes. Gradients move every step, so their addresses travel
with the step counts and scalars in one small copy from pinned memory. No step waits for the device.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from itertools import chain as chained
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..reference.step import compute_dtype
from ..runtime.device import capturing, keep, stream, upload

if TYPE_CHECKING:
    from .batch import Batch

_CODES = {torch.float32: "f", torch.float64: "d"}


class Table:
    """The static side of a batch on the device, kept from step to step while nothing in it changes.

    It belongs to the stream that made it: on another it is made anew.  What is uploaded while a CUDA graph is
    captured is there once the graph is replayed, so no later step reads it.
    """

    def __init__(self) -> None:
        self._reset_cache()

    def _reset_cache(self) -> None:
        self.key: Any = None
        self.rows: Tensor
        self.units: list[Tensor] = []
        self.sizes: list[int] = []
        self._work: dict[int | str, Tensor] = {}
        self._stream: Any = None
        self._captured = False

    def refresh(self, batch: Batch) -> None:
        """Upload addresses and integers if any differs from last time, and work lists if a size does."""
        here, captured = stream(batch.device), capturing(batch.device)
        if self._captured or (here != self._stream and not captured):
            self._reset_cache()
        known = batch.memory or memory(batch.parameters, batch.buffers)
        device_scalars = [(s.data_ptr(), s.element_size() if s.dim() else 0) for s in batch.device_scalars]
        key = known, batch.firsts, batch.streams, batch.rows, batch.places, device_scalars, batch.rng_keys
        if key == self.key:  # at once for lists that are the same ones
            if captured:
                keep(self.rows, *self.units, *self._work.values())
            return
        if captured:
            self._reset_cache()
        self.key, self._stream, self._captured = key, here, captured
        addresses, sizes, *buffers = known
        n = len(addresses)
        columns = [
            addresses, sizes, batch.firsts, batch.streams, batch.rows, *buffers,
            *([start + i * stride for i in range(n)] for start, stride in device_scalars),
            *([word] * n for word in batch.rng_keys),
        ]  # fmt: skip
        if batch.chain.units:
            counts = [place.count for place in batch.places]
            for values in self.units_of(batch):
                columns.append(list(map(Tensor.data_ptr, values.split(counts))))
            columns += [[place.stride for place in batch.places], counts]
        self.rows = upload(_host(columns, torch.int64).T.contiguous(), batch.device)
        if sizes != self.sizes:
            self.sizes, self._work = sizes, {}

    def work(self, block: int) -> Tensor:
        """For each program (tensor, block of it), int32, where programs work on so many elements."""
        return self._kept(block, lambda: [-(-size // block) for size in self.sizes])

    def unit_work(self, batch: Batch) -> Tensor:
        """For each program (tensor, unit of it), int32."""
        return self._kept("units", lambda: [place.count for place in batch.places])

    def _kept(self, kind: int | str, counts: Callable[[], list[int]]) -> Tensor:
        """A work list, made once; anew in every graph that is captured."""
        if kind in self._work:
            return self._work[kind]
        made = upload(work_list(counts()), self.rows.device)
        if self._captured or not capturing(made.device):
            self._work[kind] = made
        return made

    def units_of(self, batch: Batch) -> list[Tensor]:
        """For each name of `chain.units`, an element for each unit of each parameter."""
        if batch.chain.units and not self.units:
            total = sum(place.count for place in batch.places)
            dtype = compute_dtype(batch.parameters[0].dtype)
            self.units = [torch.ones(total, dtype=dtype, device=batch.device) for _ in batch.chain.units]
        return self.units


def work_list(counts: list[int]) -> Tensor:
    """For each program (tensor, which of its programs), int32, where tensors have so many."""
    programs = _host(counts, torch.int64)
    tensor = torch.arange(len(counts), device="cpu").repeat_interleave(programs)
    within = torch.arange(len(tensor), device="cpu") - (programs.cumsum(0) - programs)[tensor]
    return torch.stack((tensor, within), 1).int()


class Uploaded(NamedTuple):
    """The changing side of a batch on the device."""

    gradients: Tensor  # int64[n], addresses
    steps: Tensor  # int64[rows]
    step_scalars: Tensor  # compute dtype, [rows · numbers]


def upload_changes(batch: Batch) -> Uploaded:
    """Bring everything but the gradients' contents to the device, once per batch."""
    if batch.uploaded is None:
        batch.table.refresh(batch)
        # Each part starts at a multiple of 16 bytes: Triton compiles anew for a pointer that does not.
        gradients = list(map(Tensor.data_ptr, batch.gradients))
        integers = gradients + [0] * (len(gradients) % 2)
        if isinstance(batch.step_scalars, Tensor):
            addresses = upload(_host(integers, torch.int64), batch.device)
            batch.uploaded = Uploaded(addresses, torch.as_tensor(batch.steps), batch.step_scalars)
            return batch.uploaded
        first = len(integers)
        integers += [*batch.steps, *[0] * (len(batch.steps) % 2)]
        compute = compute_dtype(batch.parameters[0].dtype)
        step_scalars = array(_CODES[compute], chained.from_iterable(batch.step_scalars))
        host = torch.frombuffer(bytearray(array("q", integers)) + step_scalars.tobytes(), dtype=torch.uint8)
        data = upload(host, batch.device)
        rng_keys = data[: 8 * len(integers)].view(torch.int64)
        batch.uploaded = Uploaded(rng_keys, rng_keys[first:], data[8 * len(integers) :].view(compute))
    return batch.uploaded


def _host(values: list[Any], dtype: torch.dtype) -> Tensor:
    """In host memory, whatever the default device."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def memory(parameters: list[Tensor], buffers: list[list[Tensor]]) -> list[list[int]]:
    """Addresses and sizes of parameters, and the addresses of each buffer: `n` numbers each."""
    return [
        list(map(Tensor.data_ptr, parameters)),
        list(map(Tensor.numel, parameters)),
        *(list(map(Tensor.data_ptr, buffer)) for buffer in buffers),
    ]
