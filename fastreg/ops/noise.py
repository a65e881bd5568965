"""The operator behind noise on activations, as torch sees it, and its derivatives.

`fastreg::noise` is registered as `fastreg::dropout` is (see `ops`), and draws no random numbers either.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference import noise as reference
from ..reference.dropout import spread
from ..reference.random import PhiloxPosition
from ..reference.step import compute_dtype
from ..runtime.compile_ahead import LENGTH, compile_ahead
from ..runtime.device import aligned, architecture, triton_dtype
from ..runtime.device import launch as launch_kernel
from ..runtime.launch_parameters import LaunchParameters, launch_parameters
from . import _elementwise as elementwise
from ._elementwise import Parts, one_by_one


@torch.library.custom_op("fastreg::noise", mutates_args=())
def noise(x: Tensor, seed: Tensor, scale: Tensor, inner: int, kind: str) -> Tensor:
    """x with noise, see `reference.noise`.

    Args:
        x: Any shape; its elements count in row-major order.
        seed: int64, 0-d.
        scale: 0-d, or `[rows]`.
        inner: Elements of a row.
        kind: One of `reference.KINDS`.
    """
    x, given = x.contiguous(), scale.contiguous()
    scale = scale.view(()) if scale.numel() == 1 else given
    known = elementwise.known_seed(seed)

    def plain(parts: Parts, first: int) -> Tensor:
        return _plain(parts[0], known, scale, first, inner, kind)

    def compiled() -> Callable[[], Tensor]:
        rows, threads = bool(scale.dim()), torch.get_num_threads()
        fused = _compiled(kind, x.dtype, scale.dtype, rows, x.device, threads)
        return functools.partial(fused, x.view(-1), seed, scale, torch.tensor(inner, device=x.device))

    def fill(out: Tensor) -> None:
        # As given: a batch of one sample is no reason to compile a kernel without rows.
        launch(x, seed, given, inner, kind, out)

    return elementwise.run((x,), x.dtype, None, plain, compiled, fill)


@noise.register_fake
def _(x: Tensor, seed: Tensor, scale: Tensor, inner: int, kind: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _plain(x: Any, seed: Tensor | int, scale: Tensor, first: int, inner: int | Tensor, kind: str) -> Tensor:
    """For a run of elements that starts at `first`, a multiple of 8."""
    if scale.dim():
        scale = spread(scale, inner, first, len(x))
    return reference.noise(x, seed, scale, PhiloxPosition(first, 0, 0, 0), kind)


@functools.cache
def _compiled(
    kind: str, dtype: torch.dtype, of_scale: torch.dtype, rows: bool, device: torch.device, threads: int
) -> Callable[..., Tensor]:
    """The reference compiled for any size.

    Args:
        kind: See `noise`.
        dtype: Of x.
        of_scale: Of the scale.
        rows: Whether every row has its own.
        device: Where all are.
        threads: `torch.get_num_threads()`, which Inductor builds in.
    """

    def body(x: Tensor, seed: Tensor, scale: Tensor, inner: Tensor) -> Tensor:
        return _plain(x, seed, scale, 0, inner, kind)

    x = torch.zeros(LENGTH, dtype=dtype, device=device)
    seed, inner = torch.zeros((), dtype=torch.int64, device=device), torch.tensor(1, device=device)
    scale = torch.zeros(773 if rows else (), dtype=of_scale, device=device)
    return compile_ahead(body, (x, seed, scale, inner))


def launch(x: Tensor, seed: Tensor, scale: Tensor, inner: int, kind: str, out: Tensor) -> None:
    """Fill `out` with the kernel; the arguments are those of `noise`, contiguous."""
    kernels = importlib.import_module("fastreg_kernels.noise")
    target = architecture(out.device)
    chosen = launch_parameters("noise", target)
    block = chosen.block_for(out.numel(), target)
    launch_kernel(
        kernels.noise_kernel, -(-out.numel() // block), out.device,
        aligned(x), out, seed, scale, out.numel(), inner, block // chosen.chunk(target.lanes),
        **constants(scale, inner, kind, out.dtype, chosen, target.lanes), **chosen.options,
    )  # fmt: skip


def constants(
    scale: Tensor, inner: int, kind: str, dtype: torch.dtype, chosen: LaunchParameters, lanes: int
) -> dict[str, Any]:
    """The compile-time arguments of the kernel, for warps of so many lanes."""
    tl = importlib.import_module("triton.language")
    vector = 4 if dtype.itemsize > 2 else 8
    return {
        "KIND": kind,
        "ROWS": bool(scale.dim()),
        "GROUPED": bool(scale.dim()) and inner >= vector,
        "VECTOR": vector,
        "INDEX": tl.int32 if inner < 2**30 else tl.int64,
        "COMPUTE": triton_dtype(compute_dtype(dtype)),
        "CHUNK": chosen.chunk(lanes),
    }


class Noise(torch.autograd.Function):
    """`fastreg::noise`; the scale is not differentiated.

    Added noise leaves gradients as they are, and nothing is saved.  A factor is its own derivative, of any
    order, and is drawn again: seed and scale are saved, 12 bytes with one scale for all.
    """

    @staticmethod
    def forward(x: Tensor, seed: Tensor, scale: Tensor, inner: int, kind: str) -> Tensor:
        """Asks the operator."""
        return noise(x, seed, scale, inner, kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps what a factor follows from."""
        _, seed, scale, ctx.inner, ctx.kind = inputs
        if ctx.kind == "multiplicative":
            ctx.save_for_backward(seed, scale)
            ctx.save_for_forward(seed, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The gradient, times the factor where there is one."""
        return _times(Noise, ctx, gradient), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """Each sample on its own: with one seed for all, all have the same noise."""
        return one_by_one(Noise, info, in_dims, inputs)


class ForwardNoise(Noise):
    """With forward-mode derivatives of all that it does, which Dynamo does not take."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The gradient, times the factor where there is one."""
        return _times(ForwardNoise, ctx, gradient), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        """The same to the tangent."""
        return _times(ForwardNoise, ctx, tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """See `Noise`."""
        return one_by_one(ForwardNoise, info, in_dims, inputs)


def _times(function: Any, ctx: Any, gradient: Tensor) -> Tensor:
    if ctx.kind == "multiplicative":
        return function.apply(gradient, *ctx.saved_tensors, ctx.inner, ctx.kind)
    return gradient.view_as(gradient)
