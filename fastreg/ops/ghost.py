"""What runs sums over positions: kernels or the reference; and inner products that several layers share."""

from __future__ import annotations

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
"""Inner products that are held at a time where they are held."""
WIDEST = 2**24
"""Features of an input of the kernel at most: within a tile it counts elements in 32 bits."""


class Grams:
    """The inner products of the latest input: queries, keys and values are made of the same one."""

    def __init__(self) -> None:
        self._latest: tuple[Any, Tensor, Tensor] | None = None

    def of(self, x: Tensor) -> Tensor:
        """`reference.gram(x)`, from before if x is the same memory, unchanged."""
        place = x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, x._version
        if self._latest is None or self._latest[0] != place:
            self._latest = place, x, reference.gram(x)  # x is held, so that its memory is nobody else's
        return self._latest[2]

    def forget(self) -> None:
        """Let go of both."""
        self._latest = None


def ghost_sums(left: Tensor, right: Tensor, grams: Grams | None = None) -> Tensor:
    """`reference.ghost_sums`; some samples at a time where inner products are held."""
    samples, positions, p = left.shape
    if _by_kernel(left) and left.dtype == right.dtype and max(p, right.shape[2]) <= WIDEST:
        return _some_at_a_time(_launched, left.contiguous(), right.contiguous(), _most_samples(left))
    step = max(1, CHUNK // max(1, positions**2))
    if step >= samples:
        return reference.ghost_sums(left, right, None if grams is None else grams.of(right))
    return _some_at_a_time(reference.ghost_sums, left, right, step)


def _some_at_a_time(sums: Callable[..., Tensor], left: Tensor, right: Tensor, samples: int) -> Tensor:
    components = zip(left.split(samples), right.split(samples), strict=True)
    found = [sums(*component) for component in components]
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def sample_sums(
    grad: Tensor, x: Tensor | None = None, mean: Tensor | None = None, deviation: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    """See `reference.sample_sums`."""
    if not _by_kernel(grad):
        return reference.sample_sums(grad, x, mean, deviation)
    (samples, positions, features), kernels = grad.shape, importlib.import_module("fastreg_kernels.ghost")
    chosen = launch_parameters("sample_sums", architecture(grad.device))
    given = [None if t is None else aligned(t.contiguous()) for t in (grad, x, mean, deviation)]
    out = [torch.empty(samples, features, device=grad.device) for _ in range(2)]
    weight, bias = out[0] if x is not None else None, out[1]
    launch(
        kernels.sample_sums_kernel, samples * -(-features // chosen.block), grad.device,
        *given, weight, bias, positions, features, **sample_constants(chosen), **chosen.options,
    )  # fmt: skip
    return weight, bias


def _tiles(left: Tensor) -> int:
    """Along one side of the square of positions."""
    return -(-left.shape[1] // launch_parameters("ghost_sums", architecture(left.device)).block)


def _most_samples(left: Tensor) -> int:
    """Of a launch."""
    return max(1, MOST_PROGRAMS // _tiles(left) ** 2)


def _launched(left: Tensor, right: Tensor) -> Tensor:
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
    """The compile-time arguments of `ghost_sums_kernel`: float32 is multiplied as such, not as TF32."""
    precision, depth = ("ieee", 1) if dtype == torch.float32 else ("tf32", 2)  # as many bytes of 16 bits each
    return {
        "PRECISION": precision, "WIDEN": backend.interpreted(), "BLOCK": chosen.block,
        "DEPTH": depth * chosen.depth,
    }  # fmt: skip


def sample_constants(chosen: LaunchParameters) -> dict[str, Any]:
    """The compile-time arguments of `sample_sums_kernel`."""
    return {"BLOCK": chosen.block, "ROWS": chosen.depth}
