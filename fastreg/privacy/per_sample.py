"""Clips gradients that are held per sample: a launch for all norms, one for the factors, one for the sums."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backend
from ..device import current, triton_dtype, warp
from ..multi_tensor import BLOCK, PARTIALS, PER_THREAD, WARPS, Table, work_list
from ..reference import per_sample as reference
from ..reference.step import compute_dtype, scalar_dtype


class Clipped(NamedTuple):
    """What clipping has found, float64: `[1, samples]`, or `[tensors, samples]` if each is clipped alone."""

    norms: Tensor
    factors: Tensor


@torch.no_grad()
def clip_and_sum(
    samples: Sequence[Tensor], out: Sequence[Tensor], max_norms: Sequence[float], accumulate: bool
) -> Clipped:
    """Clip every sample and sum what is clipped into `out`.

    Samples whose norm is not finite count for nothing.

    Args:
        samples: Gradients of each tensor, `[samples, *shape]`, of the same samples everywhere.
        out: `[*shape]` each, contiguous.
        max_norms: The largest norm over all tensors, one number, or that of each tensor.
        accumulate: Whether to add to what `out` holds.
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
    for i, (tensor, target) in enumerate(zip(rows, sums, strict=True)):
        kinds.setdefault((tensor.device, tensor.dtype, target.dtype), []).append(i)
    tables, partial, segments, done = [], [], [[0, 0]] * len(rows), 0
    for (device, dtype, _), own in kinds.items():
        lengths = tuple(rows[i].shape[1] for i in own)
        addresses = [[rows[i].data_ptr(), rows[i].shape[1], sums[i].data_ptr(), i * alone] for i in own]
        tables.append(_there(addresses, device))
        work = _work(lengths, BLOCK, device)
        found = torch.empty(len(work), samples, dtype=torch.float64, device=device)
        if found.numel():
            with current(device):
                kernels.per_sample_norm_kernel[(len(work), samples)](
                    tables[-1], work, found, samples, **norm_constants(dtype, warp()), num_warps=WARPS
                )
        partial.append(found.to(home))
        for i, length in zip(own, lengths, strict=True):
            segments[i] = [done, done + -(-length // BLOCK)]
            done = segments[i][1]
    ranges = segments if alone else [[0, done]]
    result = torch.empty(2, len(ranges), samples, dtype=torch.float64, device=home)
    if samples:
        joined = partial[0] if len(partial) == 1 else torch.cat(partial)
        with current(home):
            kernels.per_sample_factor_kernel[(len(ranges), samples)](
                joined, _there(ranges, home), limits, *result, samples, BLOCK=PARTIALS, num_warps=WARPS
            )
    for ((device, dtype, sum_dtype), own), table in zip(kinds.items(), tables, strict=True):
        constants = sum_constants(dtype, sum_dtype, accumulate, warp())
        work = _work(tuple(rows[i].shape[1] for i in own), constants["CHUNK"], device)
        if len(work):
            with current(device):
                kernels.per_sample_sum_kernel[(len(work),)](
                    table, work, result[1].to(device), samples, **constants, num_warps=WARPS
                )
    return Clipped(*result)


def _there(integers: list[list[int]], device: torch.device) -> Tensor:
    return Table().upload(torch.tensor(integers, dtype=torch.int64, device="cpu"), device)


@functools.lru_cache(maxsize=64)
def _work(lengths: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    return Table().upload(work_list([-(-length // block) for length in lengths]), device)


def norm_constants(dtype: torch.dtype, warp: int) -> dict[str, Any]:
    """The compile-time arguments of `per_sample_norm_kernel`."""
    return {"G": triton_dtype(dtype), "BLOCK": BLOCK, "CHUNK": PER_THREAD * WARPS * warp}


def sum_constants(dtype: torch.dtype, sum_dtype: torch.dtype, accumulate: bool, warp: int) -> dict[str, Any]:
    """The compile-time arguments of `per_sample_sum_kernel`."""
    return {
        "G": triton_dtype(dtype),
        "S": triton_dtype(sum_dtype),
        "COMPUTE": triton_dtype(compute_dtype(dtype)),
        "ACCUMULATE": accumulate,
        "CHUNK": PER_THREAD * WARPS * warp,
    }
