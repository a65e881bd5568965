"""Registers noise on activations with torch, and defines its derivatives.

`fastreg::noise` is registered as `fastreg::dropout` is, and draws no random numbers either.
`add_noise` is what modules and functions call.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import noise as reference
from ..reference.dropout import spread
from ..reference.random import PhiloxPosition
from . import _elementwise as elementwise
from ._elementwise import Elementwise, Tensors, draw_seed, one_by_one


def _reference(
    elements: Sequence[Any], shared: Sequence[Any], seed: Tensor | int, inner: int | Tensor, first: int,
    dtype: torch.dtype, kind: str,
) -> Tensor:  # fmt: skip
    (x,), (scale,) = elements, shared
    scale = spread(scale, inner, first, len(x))
    return reference.noise(x, seed, scale, PhiloxPosition(first, 0, 0, 0), kind)


def _constants(shared: Tensors, inner: int, dtype: torch.dtype, kind: str) -> dict[str, Any]:
    tl = importlib.import_module("triton.language")
    (scale,) = shared
    assert scale is not None
    vector = 4 if dtype.itemsize > 2 else 8
    return {
        "KIND": kind,
        "ROWS": bool(scale.dim()),
        "GROUPED": bool(scale.dim()) and inner >= vector,
        "VECTOR": vector,
        "INDEX": tl.int32 if inner < 2**30 else tl.int64,
    }


NOISE = Elementwise("noise", _reference, _constants)
"""Of x; the scale is shared; the option is the kind."""


@elementwise.operator("noise")
def noise(x: Tensor, seed: Tensor, scale: Tensor, inner: int, kind: str) -> Tensor:
    """Adds noise to x or multiplies x by it, see `reference.noise`.

    x has any shape, and its elements count in row-major order.  The scale, on its device, is 0-d, or has an
    element for each row of `inner` elements.  The seed is int64, 0-d.
    """
    return elementwise.run(NOISE, (x,), (scale,), seed, inner, (kind,), x.dtype)


class NoiseFunction(torch.autograd.Function):
    """Differentiates `fastreg::noise` by x; the scale is not differentiated.

    Added noise leaves gradients as they are, and nothing is saved.  A factor is its own derivative, of any
    order, and is drawn again: seed and scale are saved, 12 bytes with one scale for all.
    """

    @staticmethod
    def forward(x: Tensor, seed: Tensor, scale: Tensor, inner: int, kind: str) -> Tensor:
        """Calls the operator with its arguments."""
        return noise(x, seed, scale, inner, kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Saves what a factor is computed from."""
        _, seed, scale, ctx.inner, ctx.kind = inputs
        if ctx.kind == "multiplicative":
            ctx.save_for_backward(seed, scale)
            ctx.save_for_forward(seed, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Returns the gradient, times the factor if there is one."""
        return _times_factor(ctx, gradient), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """Computes one sample after the other; with one seed for all, all have the same noise."""
        return one_by_one(_apply, info, in_dims, inputs)


class ForwardNoiseFunction(NoiseFunction):
    """Adds forward-mode derivatives, which Dynamo does not support."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        """Returns the tangent, times the factor if there is one."""
        return _times_factor(ctx, tangent)


def _apply(*arguments: Any) -> Any:
    return (NoiseFunction if torch.compiler.is_compiling() else ForwardNoiseFunction).apply(*arguments)


def _times_factor(ctx: Any, gradient: Tensor) -> Tensor:
    if ctx.kind == "multiplicative":
        return _apply(gradient, *ctx.saved_tensors, ctx.inner, ctx.kind)
    return gradient.view_as(gradient)


def add_noise(input: Tensor, scale: Tensor, kind: str, inner: int = 1, seed: Tensor | None = None) -> Tensor:
    """Returns the input with noise, see `noise`; by default the seed is drawn from torch's generator.

    Raises:
        TypeError: If the input is not of a floating dtype.
    """
    if not input.is_floating_point():
        raise TypeError(f"noise needs a floating dtype, got {input.dtype}")
    return _apply(input, draw_seed(input.device) if seed is None else seed, scale, inner, kind)
