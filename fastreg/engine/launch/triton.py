"""Launches the Triton kernels of a step for a batch."""

import functools
import importlib
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ...reference.step import compute_dtype
from ...runtime.device import architecture, launch, triton_dtype
from ...runtime.launch_parameters import LaunchParameters, cache_launch, launch_parameters
from ..batch import Batch, NormSpec
from ..stage import Chain, Stage
from ..table import UNIT, upload_changes


def run(batch: Batch) -> None:
    """Launches `step_kernel` over a batch."""
    table = upload_changes(batch)
    kernel, block, stages, storage, constants = _step_launch(batch.chain, batch.dtypes, batch.device)
    work = table.work(block)
    launch(
        kernel, len(work), batch.device,
        table.rows, table.gradients, table.steps, table.step_scalars, work, batch.skip, stages, storage,
        **constants,
    )  # fmt: skip
    torch.autograd.graph.increment_version(batch.parameters)  # tensors that autograd saved are out of date


def partial_norms(batch: Batch, spec: NormSpec) -> Tensor:
    """Launches `norm_kernel`: float64 `[programs]`, a partial sum (or maximum) from each program."""
    table = upload_changes(batch)
    kernel, block, turns, stages, storage, constants = _norm_launch(
        batch.chain, batch.dtypes, spec, batch.device, sum(table.sizes)
    )
    work = table.work(block)
    partial = torch.empty(len(work), dtype=torch.float64, device=batch.device)
    launch(
        kernel, len(work), batch.device,
        table.rows, table.gradients, table.steps, table.step_scalars, work, partial, turns, stages, storage,
        **constants,
    )  # fmt: skip
    return partial


def unit_squares(batch: Batch) -> Tensor:
    """Launches `unit_squares_kernel`: `[units, 2]`, in compute precision."""
    kernels = importlib.import_module("fastreg_kernels.units")
    table, target = upload_changes(batch), architecture(batch.device)
    chosen, work = launch_parameters("unit_squares", target), table.work(UNIT)
    out = torch.empty_like(work, dtype=batch.compute)
    launch(
        kernels.unit_squares_kernel, len(work), batch.device, table.rows, table.gradients, work, out,
        **unit_constants(batch.chain, batch.dtypes, chosen, target.lanes), **chosen.options,
    )  # fmt: skip
    return out


def clip_factor(partial: Tensor, limits: Tensor, largest: bool) -> Tensor:
    """Launches `clip_factor_kernel`, which adds up partial sums: `[5]`, float64 (`Measured`)."""
    kernel, constants = _clip_launch(largest, partial.device)
    out = torch.empty(5, dtype=torch.float64, device=partial.device)
    launch(kernel, 1, partial.device, partial, len(partial), limits, out, **constants)
    return out


def options(stages: Sequence[Stage], chosen: LaunchParameters) -> dict[str, Any]:
    """Returns the options with which a kernel that runs these stages is compiled."""
    exact = any(stage.exact for stage in stages)
    return {**chosen.options, **({"enable_fp_fusion": False} if exact else {})}


@cache_launch
def _step_launch(chain: Chain, dtypes: tuple[torch.dtype, ...], device: torch.device) -> tuple[Any, ...]:
    """Returns kernel, block, stages, storage and constants."""
    kernels, target = importlib.import_module("fastreg_kernels.step"), architecture(device)
    chosen = launch_parameters("step", target)
    constants = {**step_constants(chain, dtypes, chosen, target.lanes), **options(chain.stages, chosen)}
    return kernels.step_kernel, chosen.block, *device_chain(chain, dtypes), constants


@cache_launch
def _norm_launch(
    chain: Chain, dtypes: tuple[torch.dtype, ...], spec: NormSpec, device: torch.device, elements: int
) -> tuple[Any, ...]:
    """Returns kernel, block, chunks of a block, stages, storage and constants."""
    kernels, target = importlib.import_module("fastreg_kernels.norm"), architecture(device)
    chosen = launch_parameters("norm", target)
    block, before = chosen.block_for(elements, target), spec.num_stages(chain)
    stages, storage = device_chain(chain, dtypes)
    constants = norm_constants(chain, dtypes, spec, chosen, target.lanes)
    constants |= options(chain.stages[:before], chosen)
    turns = block // chosen.chunk(target.lanes)
    return kernels.norm_kernel, block, turns, stages[:before], storage, constants


@cache_launch
def _clip_launch(largest: bool, device: torch.device) -> tuple[Any, ...]:
    """Returns kernel and constants."""
    kernels = importlib.import_module("fastreg_kernels.norm")
    chosen = launch_parameters("clip_factor", architecture(device))
    return kernels.clip_factor_kernel, {"LARGEST": largest, "BLOCK": chosen.block, **chosen.options}


def step_constants(
    chain: Chain, dtypes: tuple[torch.dtype, ...], chosen: LaunchParameters, lanes: int
) -> dict[str, Any]:
    """Returns the compile-time arguments of `step_kernel` for these dtypes and warps of so many lanes."""
    return {**_constants(chain, dtypes, chosen, lanes), "RANDOM": chain.random, "BLOCK": chosen.block}


def norm_constants(
    chain: Chain, dtypes: tuple[torch.dtype, ...], spec: NormSpec, chosen: LaunchParameters, lanes: int
) -> dict[str, Any]:
    """Returns the compile-time arguments of `norm_kernel`."""
    constants = {**_constants(chain, dtypes, chosen, lanes), "KIND": spec.kind}
    if not any(stage.rng_keys for stage in chain.stages[: spec.num_stages(chain)]):
        constants["VECTOR"] = 0
    return constants


def _constants(
    chain: Chain, dtypes: tuple[torch.dtype, ...], chosen: LaunchParameters, lanes: int
) -> dict[str, Any]:
    """Returns the compile-time arguments that both kernels take."""
    return {
        "G": triton_dtype(dtypes[1]),
        "COMPUTE": triton_dtype(compute_dtype(dtypes[0])),
        "COLUMNS": _columns(chain),
        "STEP_SCALARS": sum(stage.step_scalars for stage in chain.stages),
        "VECTOR": 4 if max(dtype.itemsize for dtype in dtypes) > 2 else 8,
        "CHUNK": chosen.chunk(lanes),
    }


def unit_constants(
    chain: Chain, dtypes: tuple[torch.dtype, ...], chosen: LaunchParameters, lanes: int
) -> dict[str, Any]:
    """Returns the compile-time arguments of `unit_squares_kernel`."""
    return {
        "P": triton_dtype(dtypes[0]),
        "G": triton_dtype(dtypes[1]),
        "COMPUTE": triton_dtype(compute_dtype(dtypes[0])),
        "COLUMNS": _columns(chain),
        "LAYOUT": _columns(chain) - 2,
        "CHUNK": chosen.chunk(lanes),
    }


@functools.cache
def device_chain(chain: Chain, dtypes: tuple[torch.dtype, ...]) -> tuple[tuple[Any, ...], Any]:
    """Returns the chain as `step_kernel` takes it: columns and dtypes for every stage, and the storage."""
    kernels = importlib.import_module("fastreg_kernels.step")
    tl = importlib.import_module("triton.language")
    header = kernels.HEADER.value
    buffer_columns = range(header, header + len(chain.buffers))
    device_scalar_columns = iter(range(buffer_columns.stop, _columns(chain)))
    rng_key_columns = iter(
        range(buffer_columns.stop + sum(len(s.device_scalars) for s in chain.stages), _columns(chain))
    )
    layout_columns = tuple(range(_columns(chain) - 2, _columns(chain)))
    unit_columns = iter(range(_columns(chain) - 2 - len(chain.units), _columns(chain)))
    step_scalar_columns = iter(range(sum(stage.step_scalars for stage in chain.stages)))
    buffers = iter(zip(buffer_columns, dtypes[2:], strict=True))

    def constant(dtype: torch.dtype) -> Any:
        return tl.constexpr(
            triton_dtype(dtype)
        )  # a bare dtype in a tuple compiles ahead of time but not at launch

    stages = []
    for stage in chain.stages:
        stage_buffers = [next(buffers) for _ in stage.buffers]
        stages.append(
            kernels.Stage(
                _device_function(stage.kernel),
                tuple(column for column, _ in stage_buffers),
                tuple(constant(dtype) for _, dtype in stage_buffers),
                tuple(islice(device_scalar_columns, len(stage.device_scalars))),
                tuple(islice(rng_key_columns, len(stage.rng_keys))),
                tuple(islice(step_scalar_columns, stage.step_scalars)),
                tuple(islice(unit_columns, len(stage.units))),
                layout_columns if stage.units else (),
                tl.constexpr(stage.momentum),
            )
        )
    storage = chain.storage
    columns = {"parameter": (kernels.PARAMETER.value, dtypes[0])}
    columns.update((buffer.name, next(buffers)) for buffer in storage.buffers)
    sources, targets = ([columns[name] for name in names] for names in (storage.sources, storage.targets))
    return tuple(stages), kernels.Storage(
        *map(_device_function, storage.kernels),
        tuple(column for column, _ in sources),
        tuple(constant(dtype) for _, dtype in sources),
        tuple(column for column, _ in targets),
        tuple(constant(dtype) for _, dtype in targets),
        tuple(islice(rng_key_columns, len(storage.rng_keys))),
    )


def _columns(chain: Chain) -> int:
    header = importlib.import_module("fastreg_kernels.step").HEADER.value
    device_scalars = sum(len(stage.device_scalars) for stage in chain.stages)
    units = len(chain.units) + 2 if chain.units else 0
    return (
        header + len(chain.buffers) + device_scalars + sum(len(link.rng_keys) for link in chain.links) + units
    )


def _device_function(kernel: Any) -> Any:
    if not isinstance(kernel, str):
        return kernel
    module, name = kernel.split(".")
    functions = vars(importlib.import_module(f"fastreg_kernels.{module}"))
    if name not in functions:
        raise ValueError(f"a stage names {kernel!r}, but fastreg_kernels/{module}.py has no {name!r}")
    return functions[name]
