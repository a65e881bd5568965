"""What runs sums over positions: kernels or the reference; and inner products that several layers share."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..device import current
from ..multi_tensor import WARPS
from ..reference import ghost as reference

CHUNK = 2**24
"""Inner products that are held at a time where they are held."""
TILE = 64
"""Positions, squared: the inner products that a program of a kernel holds."""
TILE_WARPS = 8
"""Of such a program: with fewer, registers do not suffice for both products everywhere."""
FEATURES = 128
"""Of a program that sums over positions."""


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
    samples, positions, _ = left.shape
    if _by_kernel(left) and left.dtype == right.dtype:
        return _launched(left.contiguous(), right.contiguous())
    step = max(1, CHUNK // max(1, positions**2))
    if step >= samples:
        return reference.ghost_sums(left, right, None if grams is None else grams.of(right))
    pieces = zip(left.split(step), right.split(step), strict=True)
    return torch.cat([reference.ghost_sums(*piece) for piece in pieces], 1)


def sample_sums(
    grad: Tensor, x: Tensor | None = None, mean: Tensor | None = None, deviation: Tensor | None = None
) -> tuple[Tensor | None, Tensor]:
    """See `reference.sample_sums`."""
    if not _by_kernel(grad):
        return reference.sample_sums(grad, x, mean, deviation)
    (samples, _, features), kernels = grad.shape, importlib.import_module("fastreg_kernels.ghost")
    given = [None if t is None else t.contiguous() for t in (grad, x, mean, deviation)]
    out = [torch.empty(samples, features, device=grad.device) for _ in range(2)]
    weight, bias = out[0] if x is not None else None, out[1]
    with current(grad.device):
        kernels.sample_sums_kernel[(-(-features // FEATURES), samples)](
            *given, weight, bias, grad.shape[1], features, **sample_constants(), num_warps=WARPS
        )
    return weight, bias


def _launched(left: Tensor, right: Tensor) -> Tensor:
    (samples, positions, p), kernels = left.shape, importlib.import_module("fastreg_kernels.ghost")
    tiles = -(-positions // TILE)
    partial = torch.empty(5, samples, tiles * (tiles + 1) // 2, device=left.device)
    with current(left.device):
        kernels.ghost_sums_kernel[(tiles * tiles, samples)](
            left,
            right,
            partial,
            positions,
            p,
            right.shape[-1],
            **ghost_constants(left.dtype),
            num_warps=TILE_WARPS,
        )
    return partial.sum(2)


def _by_kernel(x: Tensor) -> bool:
    return bool(x.numel()) and x.dtype != torch.float64 and backend.resolve(x.device, 0) == "triton"


def ghost_constants(dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of `ghost_sums_kernel`.

    Float32 is multiplied as such.  What has 16 bits is a TF32 number as it is: nothing is lost there.
    """
    return {"PRECISION": "tf32" if dtype.itemsize < 4 else "ieee", "BLOCK": TILE, "DEPTH": 32}


def sample_constants() -> dict[str, Any]:
    """The compile-time arguments of `sample_sums_kernel`."""
    return {"BLOCK": FEATURES, "ROWS": 16}
