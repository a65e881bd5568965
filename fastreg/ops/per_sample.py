"""Clips per-sample gradients with three launches: for all norms, for the factors, for the sums."""

import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.table import work_list
from ..reference import per_sample as reference
from ..reference.step import compute_dtype, scalar_dtype
from ..runtime import backend
from ..runtime.device import architecture, capturing, launch, stream, triton_dtype, upload
from ..runtime.launch_parameters import LaunchParameters, launch_parameters


class Clipped(NamedTuple):
    """Norms and clip factors, float64: `[1, samples]`, or `[tensors, samples]` if each is clipped alone."""

    norms: Tensor
    factors: Tensor


@torch.no_grad()
def clip_and_sum(
    samples: Sequence[Tensor], out: Sequence[Tensor], max_norms: Sequence[float], accumulate: bool
) -> Clipped:
    """Clips every sample and sums the results into `out`.

    Samples whose norm is not finite are skipped.

    Args:
        samples: Gradients of each tensor, `[samples, *shape]`, of the same samples in the same order.
        out: `[*shape]` each, contiguous.
        max_norms: The largest norm over all tensors, one number, or that of each tensor.
        accumulate: Whether to add to `out`.
    """
    rows = [tensor.reshape(len(tensor), target.numel()) for tensor, target in zip(samples, out, strict=True)]
    sums = [target.view(-1) for target in out]
    home = rows[0].device
    limits = torch.tensor(list(max_norms), dtype=scalar_dtype(home), device=home)
    elements = sum(tensor.numel() for tensor in rows)
    if all(backend.resolve(tensor.device, elements) == "triton" for tensor in rows):
        return _clip_and_sum(rows, sums, limits, accumulate)
    return Clipped(*reference.clip_and_sum(rows, sums, limits, accumulate))


def _clip_and_sum(rows: list[Tensor], sums: list[Tensor], limits: Tensor, accumulate: bool) -> Clipped:
    kernels = importlib.import_module("fastreg_kernels.per_sample")
    home, samples, alone = limits.device, len(rows[0]), len(limits) > 1
    rows = [tensor.contiguous() for tensor in rows]
    kinds: dict[Any, list[int]] = {}
    for i, (tensor, total) in enumerate(zip(rows, sums, strict=True)):
        kinds.setdefault((tensor.device, tensor.dtype, total.dtype), []).append(i)
    tables, partial, segments, done = [], [], [[0, 0]] * len(rows), 0
    for (device, dtype, _), indices in kinds.items():
        lengths = tuple(rows[i].shape[1] for i in indices)
        header = [[rows[i].data_ptr(), rows[i].shape[1], sums[i].data_ptr(), i * alone] for i in indices]
        tables.append(_on_device(header, device))
        target = architecture(device)
        chosen = launch_parameters("per_sample_norm", target)
        work = _work(lengths, chosen.block, device)
        squares = torch.empty(samples, len(work), dtype=torch.float64, device=device)
        launch(
            kernels.per_sample_norm_kernel, squares.numel(), device,
            tables[-1], work, squares, len(work), **norm_constants(dtype, chosen, target.lanes),
            **chosen.options,
        )  # fmt: skip
        partial.append(squares.to(home))
        for i, length in zip(indices, lengths, strict=True):
            segments[i] = [done, done + -(-length // chosen.block)]
            done = segments[i][1]
    ranges = segments if alone else [[0, done]]
    # Two allocations, so that both start at a multiple of 16 bytes for any number of samples.
    norms, factors = (torch.empty(len(ranges), samples, dtype=torch.float64, device=home) for _ in range(2))
    joined = partial[0] if len(partial) == 1 else torch.cat(partial, 1)
    chosen = launch_parameters("per_sample_factor", architecture(home))
    launch(
        kernels.per_sample_factor_kernel, factors.numel(), home,
        joined, _on_device(ranges, home), limits, norms, factors, done, samples, BLOCK=chosen.block,
        **chosen.options,
    )  # fmt: skip
    for ((device, dtype, sum_dtype), indices), table in zip(kinds.items(), tables, strict=True):
        target = architecture(device)
        chosen = launch_parameters("per_sample_sum", target)
        constants = sum_constants(dtype, sum_dtype, accumulate, chosen, target.lanes)
        work = _work(tuple(rows[i].shape[1] for i in indices), constants["CHUNK"], device)
        launch(
            kernels.per_sample_sum_kernel, len(work), device,
            table, work, factors.to(device), samples, **constants, **chosen.options,
        )  # fmt: skip
    return Clipped(norms, factors)


def _on_device(integers: list[list[int]], device: torch.device) -> Tensor:
    return upload(torch.tensor(integers, dtype=torch.int64, device="cpu"), device)


def _work(lengths: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """Returns the (tensor, block) of each program, int32; cached for the stream, but not for a graph."""
    if capturing(device):
        return _cached_work.__wrapped__(lengths, block, device)
    return _cached_work(lengths, block, device, stream(device))


@functools.lru_cache(maxsize=64)
def _cached_work(lengths: tuple[int, ...], block: int, device: torch.device, stream: Any = None) -> Tensor:
    return upload(work_list([-(-length // block) for length in lengths]), device)


def norm_constants(dtype: torch.dtype, chosen: LaunchParameters, lanes: int) -> dict[str, Any]:
    """Returns the compile-time arguments of `per_sample_norm_kernel`."""
    return {"G": triton_dtype(dtype), "BLOCK": chosen.block, "CHUNK": chosen.chunk(lanes)}


def sum_constants(
    dtype: torch.dtype, sum_dtype: torch.dtype, accumulate: bool, chosen: LaunchParameters, lanes: int
) -> dict[str, Any]:
    """Returns the compile-time arguments of `per_sample_sum_kernel`."""
    return {
        "G": triton_dtype(dtype),
        "S": triton_dtype(sum_dtype),
        "COMPUTE": triton_dtype(compute_dtype(dtype)),
        "ACCUMULATE": accumulate,
        "CHUNK": chosen.chunk(lanes),
    }
