"""Computes per-sample sums over positions by kernels or the reference, and shares inner products."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference import ghost as reference
from ..runtime import backend
from ..runtime.device import MOST_PROGRAMS, aligned, architecture, launch
from ..runtime.launch_parameters import LaunchParameters, launch_parameters

CHUNK = 2**24
"""Inner products in memory at a time, without the kernel."""
WIDEST = 2**24
"""The most features of an input of the kernel: it counts elements of a tile in 32 bits."""


class Grams:
    """The inner products of the latest input, which queries, keys and values share."""

    def __init__(self) -> None:
        self._latest: tuple[Any, Tensor, Tensor] | None = None

    def of(self, x: Tensor) -> Tensor:
        """Returns `reference.gram(x)`; the latest result if x is the same memory, unchanged."""
        key = x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, x._version
        if self._latest is None or self._latest[0] != key:
            self._latest = key, x, reference.gram(x)  # x is kept, so that its memory is not reused
        return self._latest[2]

    def forget(self) -> None:
        """Releases the latest input and its inner products."""
        self._latest = None


def ghost_sums(left: Tensor, right: Tensor, grams: Grams | None = None) -> Tensor:
    """Returns `reference.ghost_sums`, by the kernel or for some samples at a time to save memory."""
    samples, positions, p = left.shape
    if _by_kernel(left) and left.dtype == right.dtype and max(p, right.shape[2]) <= WIDEST:
        samples = max(1, MOST_PROGRAMS // _tiles(left) ** 2)
        return _in_chunks(_launch_ghost_sums, left.contiguous(), right.contiguous(), samples)
    step = max(1, CHUNK // max(1, positions**2))
    if step >= samples:
        return reference.ghost_sums(left, right, None if grams is None else grams.of(right))
    return _in_chunks(reference.ghost_sums, left, right, step)


def _in_chunks(sums: Callable[..., Tensor], left: Tensor, right: Tensor, samples: int) -> Tensor:
    chunks = zip(left.split(samples), right.split(samples), strict=True)
    results = [sums(*chunk) for chunk in chunks]
    return results[0] if len(results) == 1 else torch.cat(results, 1)


def sample_sums(
    grad: Tensor, x: Tensor | None = None, mean: Tensor | None = None, deviation: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    """Returns `reference.sample_sums`, by the kernel or the reference."""
    if not _by_kernel(grad):
        return reference.sample_sums(grad, x, mean, deviation)
    (samples, positions, features), kernels = grad.shape, importlib.import_module("fastreg_kernels.ghost")
    chosen = launch_parameters("sample_sums", architecture(grad.device))
    inputs = [None if t is None else aligned(t.contiguous()) for t in (grad, x, mean, deviation)]
    out = [torch.empty(samples, features, device=grad.device) for _ in range(2)]
    weight, bias = out[0] if x is not None else None, out[1]
    launch(
        kernels.sample_sums_kernel, samples * -(-features // chosen.block), grad.device,
        *inputs, weight, bias, positions, features, **sample_constants(chosen), **chosen.options,
    )  # fmt: skip
    return weight, bias


def _tiles(left: Tensor) -> int:
    """Returns the number of tiles along one side of the square of positions."""
    return -(-left.shape[1] // launch_parameters("ghost_sums", architecture(left.device)).block)


def _launch_ghost_sums(left: Tensor, right: Tensor) -> Tensor:
    (samples, positions, p), kernels = left.shape, importlib.import_module("fastreg_kernels.ghost")
    chosen, tiles = launch_parameters("ghost_sums", architecture(left.device)), _tiles(left)
    partial = torch.empty(5, samples, tiles * (tiles + 1) // 2, device=left.device)
    launch(
        kernels.ghost_sums_kernel, samples * tiles * tiles, left.device,
        aligned(left), aligned(right), partial, samples, positions, p, right.shape[-1],
        **ghost_constants(left.dtype, chosen), **chosen.options,
    )  # fmt: skip
    return partial.sum(2)


def _by_kernel(x: Tensor) -> bool:
    return bool(x.numel()) and x.dtype != torch.float64 and backend.resolve(x.device, 0) == "triton"


def ghost_constants(dtype: torch.dtype, chosen: LaunchParameters) -> dict[str, Any]:
    """Returns the compile-time arguments of `ghost_sums_kernel`: float32 is not multiplied as TF32."""
    wide = dtype == torch.float32
    depth = chosen.depth if wide else 2 * chosen.depth  # as many bytes
    precision = "ieee" if wide else "tf32"
    return {"PRECISION": precision, "WIDEN": backend.interpreted(), "BLOCK": chosen.block, "DEPTH": depth}


def sample_constants(chosen: LaunchParameters) -> dict[str, Any]:
    """Returns the compile-time arguments of `sample_sums_kernel`."""
    return {"BLOCK": chosen.block, "ROWS": chosen.depth}
