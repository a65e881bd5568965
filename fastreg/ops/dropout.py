"""Registers dropout, and the operators fused around it, with torch, and defines their derivatives.

`fastreg::dropout` and its fused relatives are registered once, for all devices.  They draw no random numbers:
seeds come in tensors, from `torch.randint`, whose calls a compiler does not merge, and which it replays and
recomputes.

Operators have no derivatives.  Those are in the `autograd.Function` classes below, which also implement the
transformations of `torch.func`.  `drop` and `fused_drop` are what modules and functions call.
"""

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import dropout as reference
from ..reference.random import PhiloxPosition
from ..reference.step import compute_dtype
from . import _elementwise as elementwise
from ._elementwise import Elementwise, Tensors, draw_seed, one_by_one, transformed


def _reference(
    elements: Sequence[Any], shared: Tensors, seed: Tensor | int, inner: int | Tensor, first: int,
    dtype: torch.dtype, activation: str,
) -> Tensor:  # fmt: skip
    """Computes a run of elements; with a gradient, its product with the derivative by x."""
    x, residual, gradient = elements
    bias, drop_thresholds = shared
    assert drop_thresholds is not None
    if bias is not None:
        bias = reference.spread(bias, 1, first, len(x))
    drop_thresholds = reference.spread(drop_thresholds, inner, first, len(x))
    at = PhiloxPosition(first, 0, 0, 0)
    if gradient is None:
        return reference.dropout(x, bias, residual, seed, drop_thresholds, at, activation, dtype)
    return reference.dropout_backward(gradient, x, bias, seed, drop_thresholds, at, activation, dtype)


def _constants(shared: Tensors, inner: int, dtype: torch.dtype, activation: str) -> dict[str, Any]:
    tl = importlib.import_module("triton.language")
    bias, drop_thresholds = shared
    assert drop_thresholds is not None
    return {
        "ACTIVATION": activation,
        "COLUMNS": 1 if bias is None else bias.numel(),
        "CHANNELS": drop_thresholds.numel() if drop_thresholds.dim() else 0,
        "INDEX": tl.int32 if inner * drop_thresholds.numel() < 2**30 else tl.int64,
    }


DROPOUT = Elementwise("dropout", _reference, _constants)
"""Of x, residual and gradient; a bias and drop thresholds are shared; the option is the activation."""

# Operators --------------------------------------------------------------------------------------------------


@elementwise.operator("dropout")
def dropout(
    x: Tensor, seed: Tensor, drop_thresholds: Tensor, inner: int, noise_shape: Sequence[int] | None
) -> Tensor:
    """Drops elements of x, of any shape, which count in row-major order, and scales the others.

    Thresholds are int32, 0-d, or `[channels]`: rates times 65536.  Channels take turns, with `inner` elements
    each.  The seed is int64, 0-d; `noise_shape` is the shape of a mask that is broadcast.
    """
    if noise_shape is None:
        return _drop(x, seed, drop_thresholds, inner)
    ones = torch.ones(tuple(noise_shape), dtype=compute_dtype(x.dtype), device=x.device)
    factors = _drop(ones, seed, drop_thresholds, inner)
    return torch.where(factors != 0, x, 0).mul_(factors).contiguous()


@torch.library.custom_op("fastreg::dropout_", mutates_args=("x",))
def dropout_(
    x: Tensor, seed: Tensor, drop_thresholds: Tensor, inner: int, noise_shape: Sequence[int] | None
) -> None:
    """Drops elements of x and scales the others, in place."""
    if noise_shape is None and x.is_contiguous():
        _drop(x, seed, drop_thresholds, inner, out=x)
    else:
        x.copy_(dropout(x, seed, drop_thresholds, inner, noise_shape))


def _drop(x: Tensor, seed: Tensor, drop_thresholds: Tensor, inner: int, out: Tensor | None = None) -> Tensor:
    shared = None, drop_thresholds
    return elementwise.run(DROPOUT, (x, None, None), shared, seed, inner, ("identity",), x.dtype, out)


def _promoted(x: Tensor, bias: Tensor | None, residual: Tensor | None, *_: Any) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


@elementwise.operator("bias_act_dropout_add", _promoted)
def bias_act_dropout_add(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor, drop_thresholds: Tensor,
    inner: int, activation: str,
) -> Tensor:  # fmt: skip
    """Returns residual + dropout(activation(x + bias)); the bias lies along the last dimension."""
    elements, shared, dtype = (x, residual, None), (bias, drop_thresholds), _promoted(x, bias, residual)
    return elementwise.run(DROPOUT, elements, shared, seed, inner, (activation,), dtype)


@elementwise.operator("bias_act_dropout_backward")
def bias_act_dropout_backward(
    x: Tensor, bias: Tensor | None, gradient: Tensor, seed: Tensor, drop_thresholds: Tensor, inner: int,
    activation: str,
) -> Tensor:  # fmt: skip
    """Returns the gradient by x."""
    elements, shared = (x, None, gradient), (bias, drop_thresholds)
    return elementwise.run(DROPOUT, elements, shared, seed, inner, (activation,), x.dtype)


# Derivatives ------------------------------------------------------------------------------------------------


class DropoutFunction(torch.autograd.Function):
    """Differentiates `fastreg::dropout`, which is its own derivative, of any order.

    The backward pass needs seed and drop thresholds alone: 12 bytes with one rate for all.
    """

    @staticmethod
    def forward(
        x: Tensor, seed: Tensor, drop_thresholds: Tensor, inner: int, noise_shape: Sequence[int] | None
    ) -> Tensor:
        """Calls the operator with its arguments."""
        return dropout(x, seed, drop_thresholds, inner, noise_shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Saves what the mask is computed from."""
        _, seed, drop_thresholds, ctx.inner, ctx.noise_shape = inputs
        ctx.save_for_backward(seed, drop_thresholds)
        ctx.save_for_forward(seed, drop_thresholds)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Drops the same elements of the gradient."""
        return _apply(gradient, *ctx.saved_tensors, ctx.inner, ctx.noise_shape), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """Draws one mask for all samples if they share a seed, as with `randomness="same"`."""
        of_x, of_seed, of_thresholds, *_ = in_dims
        if of_seed is not None or of_thresholds is not None:
            return one_by_one(_apply, info, in_dims, inputs)
        x, seed, drop_thresholds, inner, noise_shape = inputs
        x = x.movedim(of_x, 0)
        shape = (1, *(x.shape[1:] if noise_shape is None else noise_shape))
        return _apply(x, seed, drop_thresholds, inner, shape), 0


class ForwardDropoutFunction(DropoutFunction):
    """Adds forward-mode derivatives, which Dynamo does not support."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        """Drops the same elements of the tangent."""
        return _apply(tangent, *ctx.saved_tensors, ctx.inner, ctx.noise_shape)


def _apply(*arguments: Any) -> Any:
    return (DropoutFunction if torch.compiler.is_compiling() else ForwardDropoutFunction).apply(*arguments)


class InplaceDropoutFunction(torch.autograd.Function):
    """Differentiates `fastreg::dropout_`, which works in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, seed: Tensor, drop_thresholds: Tensor, inner: int,
        noise_shape: Sequence[int] | None,
    ) -> Tensor:  # fmt: skip
        """Drops elements of x and scales the others, in place."""
        ctx.mark_dirty(x)
        ctx.save_for_backward(seed, drop_thresholds)
        ctx.inner, ctx.noise_shape = inner, noise_shape
        dropout_(x, seed, drop_thresholds, inner, noise_shape)
        return x

    backward = DropoutFunction.backward


class FusedDropoutFunction(torch.autograd.Function):
    """Differentiates `fastreg::bias_act_dropout_add`; keeps x only for an activation's derivative."""

    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor, drop_thresholds: Tensor,
        inner: int, activation: str,
    ) -> Tensor:  # fmt: skip
        """Calls the operator with its arguments."""
        return bias_act_dropout_add(x, bias, residual, seed, drop_thresholds, inner, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Saves what the mask is computed from, and the arguments of an activation."""
        x, bias, residual, seed, drop_thresholds, ctx.inner, ctx.activation = inputs
        kept = (None, None) if ctx.activation == "identity" else (x, bias)
        ctx.save_for_backward(*kept, seed, drop_thresholds)
        ctx.dtypes = [t if t is None else t.dtype for t in (x, bias, residual)]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Returns the gradients by x, bias (a sum over all but the last dimension) and residual."""
        x, bias, *mask = ctx.saved_tensors
        of_x, of_bias, of_residual = ctx.dtypes
        g = b = r = None
        if any(ctx.needs_input_grad[:2]):
            if ctx.activation == "identity":
                g = _apply(gradient, *mask, ctx.inner, None).to(of_x)
            else:
                g = _FusedBackwardFunction.apply(x, bias, gradient, *mask, ctx.inner, ctx.activation)
        if ctx.needs_input_grad[1]:
            assert g is not None
            b = g[None].flatten(0, -2).sum(0, dtype=torch.promote_types(of_bias, torch.float32)).to(of_bias)
        if ctx.needs_input_grad[2]:
            r = gradient.to(of_residual)
        return g if ctx.needs_input_grad[0] else None, b, r, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """Computes one sample after the other."""
        return one_by_one(FusedDropoutFunction.apply, info, in_dims, inputs)


class _FusedBackwardFunction(torch.autograd.Function):
    """Calls `fastreg::bias_act_dropout_backward`, which has no derivative."""

    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, gradient: Tensor, seed: Tensor, drop_thresholds: Tensor, inner: int,
        activation: str,
    ) -> Tensor:  # fmt: skip
        return bias_act_dropout_backward(x, bias, gradient, seed, drop_thresholds, inner, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "dropout fused with an activation can be differentiated once; for second derivatives use the "
            "activation and fastreg.nn.Dropout"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        return one_by_one(_FusedBackwardFunction.apply, info, in_dims, inputs)


# Calls ------------------------------------------------------------------------------------------------------


def drop(
    input: Tensor, drop_thresholds: Tensor, inplace: bool = False, *, dim: int = -1,
    noise_shape: Sequence[int] | None = None, return_mask: bool = False, seed: Tensor | None = None,
) -> Any:  # fmt: skip
    """Drops elements as `nn.functional.dropout` does, by thresholds on the device of the input.

    Thresholds are int32, 0-d or `[channels]`, see `nn.rates.drop_thresholds`; the seed is int64, 0-d, and by
    default drawn from torch's generator.  For other arguments and errors see `nn.functional.dropout`.
    """
    if not input.is_floating_point():
        raise TypeError(f"dropout needs a floating dtype, got {input.dtype}")
    if noise_shape is not None:
        noise_shape = tuple(noise_shape)
        if len(noise_shape) != input.dim() or any(
            a not in (1, b) for a, b in zip(noise_shape, input.shape, strict=True)
        ):
            raise ValueError(
                f"noise_shape must have the input's sizes {tuple(input.shape)} or 1, got {noise_shape}"
            )
    shape = input.shape if noise_shape is None else noise_shape
    inner = _inner_size(shape, drop_thresholds, dim)
    seed = draw_seed(input.device) if seed is None else seed
    if inplace and not torch.compiler.is_compiling() and not transformed():
        out = InplaceDropoutFunction.apply(input, seed, drop_thresholds, inner, noise_shape)
    else:
        out = _apply(input, seed, drop_thresholds, inner, noise_shape)
        if inplace:
            out = input.copy_(out)
    if not return_mask:
        return out
    ones = torch.ones(tuple(shape), dtype=torch.float32, device=input.device)
    return out, dropout(ones, seed, drop_thresholds, inner, None) != 0


def fused_drop(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, drop_thresholds: Tensor | None, activation: str
) -> Tensor:
    """Computes `nn.functional.bias_act_dropout_add` by thresholds on the device of x.

    Thresholds of `None` keep all, and draw no random number.  For other arguments and errors see there.
    """
    if not x.is_floating_point():
        raise TypeError(f"dropout needs a floating dtype, got {x.dtype}")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(
            f"bias must have shape {tuple(x.shape[-1:])}, as x has features, got {tuple(bias.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of x, got {tuple(residual.shape)} and {tuple(x.shape)}; "
            "use .expand_as(x)"
        )
    if drop_thresholds is None:
        seed = torch.zeros((), dtype=torch.int64, device=x.device)
        drop_thresholds = torch.zeros((), dtype=torch.int32, device=x.device)
    else:
        seed = draw_seed(x.device)
    inner = _inner_size(x.shape, drop_thresholds, -1)
    return FusedDropoutFunction.apply(x, bias, residual, seed, drop_thresholds, inner, activation)


def drop_samples(input: Tensor, drop_threshold: Tensor, scale: bool = True) -> Tensor:
    """Drops samples as `nn.functional.drop_path` does, by a threshold on the device of the input."""
    shape = (*input.shape[:1], *[1] * (input.dim() - 1))
    if scale:
        return drop(input, drop_threshold, noise_shape=shape)
    ones = torch.ones(shape, device=input.device)
    factors = dropout(ones, draw_seed(input.device), drop_threshold, 1, None)
    return torch.where(factors != 0, input, 0)


def _inner_size(shape: Sequence[int], drop_thresholds: Tensor, dim: int) -> int:
    """Returns how many elements follow each other in a channel."""
    if not drop_thresholds.dim():
        return 1
    if not -len(shape) <= dim < len(shape):
        raise IndexError(f"dim must be in [{-len(shape)}, {len(shape) - 1}], got {dim}")
    if len(drop_thresholds) != shape[dim]:
        raise ValueError(
            f"p has {len(drop_thresholds)} rates, but dimension {dim} of shape {tuple(shape)} has "
            f"{shape[dim]} channels"
        )
    return math.prod(shape[dim % len(shape) + 1 :])
