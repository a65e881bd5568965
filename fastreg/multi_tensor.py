"""Many tensors, one launch: a batch of parameters and the three ways to run a step over it.

On a GPU a table of addresses and integers in device memory takes the place of kernel arguments.  What is
static (`Table`) is uploaded when it changes; gradients move every step, so their addresses travel with
the step counts and numbers in one small copy from pinned memory.  No step waits for the device.
"""

from __future__ import annotations

import functools
import importlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain as chained
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend
from .chain import Chain, Stage
from .compiled import compiled_norm, compiled_step
from .device import architecture, capturing, keep, launch, stream, triton_dtype, upload
from .launch_parameters import LaunchParameters, launch_parameters
from .reference import norm as reference_norm
from .reference import units as reference_units
from .reference.random import At
from .reference.step import CHUNK, compute_dtype, run_stages, scalar_dtype
from .reference.step import step as reference_step
from .reference.units import Place

_CODES = {torch.float32: "f", torch.float64: "d"}


@dataclass
class Batch:
    """Parameters that take one step together: same device, same dtypes, same chain.

    Parameters and buffers are dense, and every gradient and buffer has the memory layout of its parameter.

    Args:
        chain: What is done to each.
        parameters: The local tensors, `n` of them.
        gradients: Likewise; only read.
        buffers: For each buffer of the chain, `n` tensors.
        scalars: For each scalar of the chain, a float64 tensor on the device, 0-d or `[n]`.
        words: For each word of the chain, an integer for all.
        firsts: Global index of the first element of each.
        streams: Random stream of each.
        rows: Which row of `steps` and `numbers` is whose.
        steps: Step count of each row; a tensor where the device counts.
        numbers: The numbers of the chain, for each row; where the device counts, a tensor.
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
    scalars: list[Tensor]
    words: list[int]
    firsts: list[int]
    streams: list[int]
    rows: list[int]
    steps: list[int] | Tensor
    numbers: list[list[float]] | Tensor
    places: list[Place] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    skip: Tensor | None = None
    table: Table = field(default_factory=lambda: Table())
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


def memory(parameters: list[Tensor], buffers: list[list[Tensor]]) -> list[list[int]]:
    """Addresses and sizes of parameters, and the addresses of each buffer: `n` numbers each."""
    return [
        list(map(Tensor.data_ptr, parameters)),
        list(map(Tensor.numel, parameters)),
        *(list(map(Tensor.data_ptr, buffer)) for buffer in buffers),
    ]


def run(batch: Batch) -> None:
    """Take the step."""
    if batch.backend == "triton":
        _run_triton(batch)
    elif batch.skip is None or not batch.skip.item():
        _run_reference(batch)
    for place, used in batch.copies:
        place.copy_(used)


class Measurand(NamedTuple):
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


GRADIENT = Measurand()


def measure(batches: Sequence[Batch], limits: Tensor, of: Measurand = GRADIENT) -> Tensor:
    """`reference.norm.Measured` over batches of one device: `[5]`, float64, there.

    Args:
        batches: The gradients.
        limits: (max_norm, 1 / scale), float64, on the device.
        of: What is measured.
    """
    if all(batch.backend == "triton" for batch in batches):
        return _finish(torch.cat([_partial_norms(batch, of) for batch in batches]), limits, of.largest)
    found = [_partial_norms_there(batch, of) for batch in batches]
    return reference_norm.clip_factor(torch.cat(found), limits, of.largest)


def combine(totals: Sequence[Tensor], limits: Tensor, largest: bool) -> Tensor:
    """`measure` from the totals of several groups, each 0-d and on the device of `limits`."""
    return reference_norm.clip_factor(torch.stack(tuple(totals)), limits, largest)


def unit_squares(batch: Batch) -> Tensor:
    """(Σ p², Σ g²) over every unit of every parameter: `[units, 2]`, in compute precision."""
    if batch.backend == "triton":
        return _unit_squares(batch)
    flats = (list(map(flat, tensors)) for tensors in (batch.parameters, batch.gradients))
    return torch.cat(list(map(reference_units.unit_squares, *flats, batch.places)))


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie in memory: a `[n]` view."""
    return tensor if tensor.dim() == 1 else tensor.as_strided((tensor.numel(),), (1,))


# ------------------------------------------------------------------------------------- reference, compiled


class _Operands(NamedTuple):
    """A run of elements of one parameter, and what the reference takes with it."""

    tensors: list[Tensor]  # parameter, gradient, buffers, units
    scalars: Tensor
    words: Sequence[Tensor]
    numbers: Tensor
    first: int
    stream: int
    step: int


def _operands(batch: Batch, chunked: bool) -> Iterator[_Operands]:
    chain, dtype, count = batch.chain, compute_dtype(batch.parameters[0].dtype), len(batch.parameters)
    rows = torch.as_tensor(batch.numbers, dtype=dtype, device=batch.device).unbind()
    steps = batch.steps if isinstance(batch.steps, list) else batch.steps.tolist()
    words = torch.tensor(batch.words, dtype=torch.int64, device=batch.device).unbind()
    columns = [scalar.expand(count).to(dtype) for scalar in batch.scalars]
    scalars = (
        torch.stack(columns, 1) if columns else torch.empty(count, 0, dtype=dtype, device=batch.device)
    ).unbind()
    for i, (parameter, first) in enumerate(zip(batch.parameters, batch.firsts, strict=True)):
        tensors = [flat(t) for t in (parameter, batch.gradients[i], *(b[i] for b in batch.buffers))]
        if chain.units:
            counts = [place.number for place in batch.places]
            for values in batch.table.units_of(batch):
                own = values.split(counts)[i]
                tensors.append(reference_units.spread(own, batch.places[i], tensors[0].numel()))
        row, elements = batch.rows[i], parameter.numel()
        for start, stop in _runs(elements, first) if chunked else [(0, elements)]:
            if stop > start:
                part = tensors if stop - start == elements else [t[start:stop] for t in tensors]
                place = first + start, batch.streams[i], steps[row]
                yield _Operands(part, scalars[i], words, rows[row], *place)


def _run_reference(batch: Batch) -> None:
    chain = batch.chain
    # Only random numbers need elements in whole groups, and only their temporaries make short runs pay.
    _run_operands(
        batch,
        list(_operands(batch, chain.random)),
        compiled_step,
        (chain,),
        functools.partial(reference_step, chain),
    )


def _run_operands(
    batch: Batch,
    runs: list[_Operands],
    compiled: Callable[..., Any],
    of: tuple[Any, ...],
    plain: Callable[..., Any],
) -> list[Any]:
    """What each run gives, compiled where the backend is and it can be."""
    chain, dtype = batch.chain, compute_dtype(batch.parameters[0].dtype)
    fused = None
    if batch.backend == "compiled":
        try:
            dtypes = (*batch.dtypes, *[dtype] * len(chain.units))
            fused = compiled(*of, dtypes, dtype, batch.device, torch.get_num_threads())
        except Exception as error:
            backend.cannot_compile(error)
    if fused is not None and runs:
        integers = torch.tensor(
            [[run.first, run.stream, run.step, *batch.words] for run in runs], device=batch.device
        ).unbind()
    found = []
    for i, run in enumerate(runs):
        if fused is not None and run.tensors[0].numel() > 1 and not (chain.random and run.first % 8):
            found.append(fused(run.tensors, run.scalars, integers[i], run.numbers))
        else:
            found.append(plain(*_arguments(batch, run)))
    return found


def _partial_norms_there(batch: Batch, of: Measurand) -> Tensor:
    """Partial sums, or the largest of each, by the reference or its compiled form."""
    stages, chain = of.of(batch.chain), batch.chain
    if not stages:
        return reference_norm.partial_norms(map(flat, batch.gradients), of.largest, batch.device, of.absolute)

    def plain(*arguments: Any) -> Tensor:
        _, u = run_stages(stages, False, chain, *arguments)
        u = u[1] if of.momentum else u
        parts = reference_norm.partial_norms([u], of.largest, batch.device, of.absolute)
        return parts.amax() if of.largest else parts.sum()

    runs = list(_operands(batch, True))
    what = chain, stages, of.momentum, of.largest, of.absolute
    found = _run_operands(batch, runs, compiled_norm, what, plain)
    scalar = scalar_dtype(batch.device)
    return torch.stack(found).to(scalar) if found else torch.zeros(1, dtype=scalar, device=batch.device)


def _arguments(batch: Batch, run: _Operands) -> tuple[Any, ...]:
    """Those of `reference.step` behind the chain."""
    parameter, gradient, *others = run.tensors
    held = len(batch.buffers)
    at = At(run.first - run.first % 8, run.first % 8, run.stream, run.step)
    own = run.scalars.unbind(), run.words, run.numbers.unbind()
    return parameter, gradient, others[:held], others[held:], *own, at


def _runs(count: int, first: int) -> Iterable[tuple[int, int]]:
    """Runs of at most `CHUNK` elements, all but the first of which start at a global multiple of 8."""
    head = min(-first % 8, count)
    if head:
        yield 0, head
    for start in range(head, count, CHUNK):
        yield start, min(start + CHUNK, count)


# --------------------------------------------------------------------------------------------------- Triton


class Table:
    """The static side of a batch on the device, kept from step to step while nothing in it changes.

    It belongs to the stream that made it: on another it is made anew.  What is uploaded while a CUDA graph is
    captured is there once the graph is replayed, so no later step reads it.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
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
            self._forget()
        known = batch.memory or memory(batch.parameters, batch.buffers)
        scalars = [(s.data_ptr(), s.element_size() if s.dim() else 0) for s in batch.scalars]
        key = known, batch.firsts, batch.streams, batch.rows, batch.places, scalars, batch.words
        if key == self.key:  # at once for lists that are the same ones
            if captured:
                keep(self.rows, *self.units, *self._work.values())
            return
        if captured:
            self._forget()
        self.key, self._stream, self._captured = key, here, captured
        addresses, sizes, *buffers = known
        n = len(addresses)
        columns = [
            addresses, sizes, batch.firsts, batch.streams, batch.rows, *buffers,
            *([start + i * stride for i in range(n)] for start, stride in scalars),
            *([word] * n for word in batch.words),
        ]  # fmt: skip
        if batch.chain.units:
            counts = [place.number for place in batch.places]
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
        return self._kept("units", lambda: [place.number for place in batch.places])

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
            total = sum(place.number for place in batch.places)
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
    numbers: Tensor  # compute dtype, [rows · numbers]


def _begin(batch: Batch) -> Uploaded:
    """Bring everything but the gradients' contents to the device, once per batch."""
    if batch.uploaded is None:
        batch.table.refresh(batch)
        # Each part starts at a multiple of 16 bytes: Triton compiles anew for a pointer that does not.
        gradients = list(map(Tensor.data_ptr, batch.gradients))
        integers = gradients + [0] * (len(gradients) % 2)
        if isinstance(batch.numbers, Tensor):
            addresses = upload(_host(integers, torch.int64), batch.device)
            batch.uploaded = Uploaded(addresses, torch.as_tensor(batch.steps), batch.numbers)
            return batch.uploaded
        first = len(integers)
        integers += [*batch.steps, *[0] * (len(batch.steps) % 2)]
        compute = compute_dtype(batch.parameters[0].dtype)
        numbers = array(_CODES[compute], chained.from_iterable(batch.numbers))
        host = torch.frombuffer(bytearray(array("q", integers)) + numbers.tobytes(), dtype=torch.uint8)
        data = upload(host, batch.device)
        words = data[: 8 * len(integers)].view(torch.int64)
        batch.uploaded = Uploaded(words, words[first:], data[8 * len(integers) :].view(compute))
    return batch.uploaded


def _host(values: list[Any], dtype: torch.dtype) -> Tensor:
    """In host memory, whatever the default device."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def _run_triton(batch: Batch) -> None:
    kernels = importlib.import_module("fastreg_kernels.step")
    changing, target = _begin(batch), architecture(batch.device)
    chosen = launch_parameters("step", target)
    work = batch.table.work(chosen.block)
    stages, storage = device_chain(batch.chain, batch.dtypes)
    launch(
        kernels.step_kernel, len(work), batch.device,
        batch.table.rows, changing.gradients, changing.steps, changing.numbers, work, batch.skip, stages,
        storage, **step_constants(batch.chain, batch.dtypes, chosen, target.lanes),
        **options(batch.chain.stages, chosen),
    )  # fmt: skip
    torch.autograd.graph.increment_version(batch.parameters)  # what autograd saved of them is out of date


def _partial_norms(batch: Batch, of: Measurand) -> Tensor:
    kernels = importlib.import_module("fastreg_kernels.norm")
    changing, target, sizes = _begin(batch), architecture(batch.device), batch.table.sizes
    chosen = launch_parameters("norm", target)
    block = chosen.block_for(sum(sizes), target)
    work = batch.table.work(block)
    partial = torch.empty(len(work), dtype=torch.float64, device=batch.device)
    stages, storage = device_chain(batch.chain, batch.dtypes)
    before = of.of(batch.chain)
    launch(
        kernels.norm_kernel, len(work), batch.device,
        batch.table.rows, changing.gradients, changing.steps, changing.numbers, work, partial,
        block // chosen.chunk(target.lanes), stages[:before], storage,
        **norm_constants(batch.chain, batch.dtypes, of, chosen, target.lanes),
        **options(batch.chain.stages[:before], chosen),
    )  # fmt: skip
    return partial


def _unit_squares(batch: Batch) -> Tensor:
    kernels = importlib.import_module("fastreg_kernels.units")
    changing, target = _begin(batch), architecture(batch.device)
    chosen, work = launch_parameters("unit_squares", target), batch.table.unit_work(batch)
    out = torch.empty_like(work, dtype=compute_dtype(batch.parameters[0].dtype))
    launch(
        kernels.unit_squares_kernel, len(work), batch.device,
        batch.table.rows, changing.gradients, work, out,
        **unit_constants(batch.chain, batch.dtypes, chosen, target.lanes), **chosen.options,
    )  # fmt: skip
    return out


def _finish(partial: Tensor, limits: Tensor, largest: bool) -> Tensor:
    kernels = importlib.import_module("fastreg_kernels.norm")
    chosen = launch_parameters("clip_factor", architecture(partial.device))
    out = torch.empty(5, dtype=torch.float64, device=partial.device)
    launch(
        kernels.clip_factor_kernel, 1, partial.device,
        partial, len(partial), limits, out, LARGEST=largest, BLOCK=chosen.block, **chosen.options,
    )  # fmt: skip
    return out


def options(stages: Sequence[Stage], chosen: LaunchParameters) -> dict[str, Any]:
    """How a kernel that runs these stages is compiled."""
    exact = any(stage.exact for stage in stages)
    return {**chosen.options, **({"enable_fp_fusion": False} if exact else {})}


@functools.cache
def step_constants(
    chain: Chain, dtypes: tuple[torch.dtype, ...], chosen: LaunchParameters, lanes: int
) -> dict[str, Any]:
    """The compile-time arguments of `step_kernel` for tensors of these dtypes and warps of so many lanes."""
    return {**_constants(chain, dtypes, chosen, lanes), "RANDOM": chain.random, "BLOCK": chosen.block}


def norm_constants(
    chain: Chain, dtypes: tuple[torch.dtype, ...], of: Measurand, chosen: LaunchParameters, lanes: int
) -> dict[str, Any]:
    """The compile-time arguments of `norm_kernel`."""
    random = any(stage.words for stage in chain.stages[: of.of(chain)])
    measured = {"LARGEST": of.largest, "ABSOLUTE": of.absolute, "MOMENTUM": of.momentum}
    return {**_constants(chain, dtypes, chosen, lanes), "RANDOM": random, **measured}


@functools.cache
def _constants(
    chain: Chain, dtypes: tuple[torch.dtype, ...], chosen: LaunchParameters, lanes: int
) -> dict[str, Any]:
    """What both kernels take."""
    return {
        "G": triton_dtype(dtypes[1]),
        "COMPUTE": triton_dtype(compute_dtype(dtypes[0])),
        "COLUMNS": _columns(chain),
        "NUMBERS": sum(stage.numbers for stage in chain.stages),
        "VECTOR": 4 if max(dtype.itemsize for dtype in dtypes) > 2 else 8,
        "CHUNK": chosen.chunk(lanes),
    }


def unit_constants(
    chain: Chain, dtypes: tuple[torch.dtype, ...], chosen: LaunchParameters, lanes: int
) -> dict[str, Any]:
    """The compile-time arguments of `unit_squares_kernel`."""
    return {
        "P": triton_dtype(dtypes[0]),
        "G": triton_dtype(dtypes[1]),
        "COMPUTE": triton_dtype(compute_dtype(dtypes[0])),
        "COLUMNS": _columns(chain),
        "PLACE": _columns(chain) - 2,
        "CHUNK": chosen.chunk(lanes),
    }


@functools.cache
def device_chain(chain: Chain, dtypes: tuple[torch.dtype, ...]) -> tuple[tuple[Any, ...], Any]:
    """The chain as `step_kernel` takes it: columns and dtypes for every stage, and the storage."""
    kernels = importlib.import_module("fastreg_kernels.step")
    tl = importlib.import_module("triton.language")
    header = kernels.HEADER.value
    buffer_columns = range(header, header + len(chain.buffers))
    scalar_columns = iter(range(buffer_columns.stop, _columns(chain)))
    word_columns = iter(
        range(buffer_columns.stop + sum(len(s.scalars) for s in chain.stages), _columns(chain))
    )
    place = tuple(range(_columns(chain) - 2, _columns(chain)))
    unit_columns = iter(range(_columns(chain) - 2 - len(chain.units), _columns(chain)))
    number_columns = iter(range(sum(stage.numbers for stage in chain.stages)))
    buffers = iter(zip(buffer_columns, dtypes[2:], strict=True))

    def constant(dtype: torch.dtype) -> Any:
        return tl.constexpr(
            triton_dtype(dtype)
        )  # a bare dtype in a tuple compiles ahead of time but not at launch

    stages = []
    for stage in chain.stages:
        own = [next(buffers) for _ in stage.buffers]
        stages.append(
            kernels.Stage(
                _device_function(stage.kernel),
                tuple(column for column, _ in own),
                tuple(constant(dtype) for _, dtype in own),
                tuple(islice(scalar_columns, len(stage.scalars))),
                tuple(islice(word_columns, len(stage.words))),
                tuple(islice(number_columns, stage.numbers)),
                tuple(islice(unit_columns, len(stage.units))),
                place if stage.units else (),
            )
        )
    storage = chain.storage
    places = {"parameter": (kernels.PARAMETER.value, dtypes[0])}
    places.update((buffer.name, next(buffers)) for buffer in storage.buffers)
    sources, targets = ([places[name] for name in names] for names in (storage.sources, storage.targets))
    return tuple(stages), kernels.Storage(
        *map(_device_function, storage.kernels),
        tuple(column for column, _ in sources),
        tuple(constant(dtype) for _, dtype in sources),
        tuple(column for column, _ in targets),
        tuple(constant(dtype) for _, dtype in targets),
        tuple(islice(word_columns, len(storage.words))),
    )


def _columns(chain: Chain) -> int:
    header = importlib.import_module("fastreg_kernels.step").HEADER.value
    scalars = sum(len(stage.scalars) for stage in chain.stages)
    units = len(chain.units) + 2 if chain.units else 0
    return header + len(chain.buffers) + scalars + sum(len(link.words) for link in chain.links) + units


def _device_function(kernel: Any) -> Any:
    if not isinstance(kernel, str):
        return kernel
    module, name = kernel.split(".")
    return getattr(importlib.import_module(f"fastreg_kernels.{module}"), name)
