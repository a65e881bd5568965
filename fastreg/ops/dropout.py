"""The operators behind dropout and what is fused around it, as torch sees them.

`fastreg::dropout` and its fused relatives are registered once, for every device: `backend` decides at each
call whether a kernel, the compiled reference or the reference runs.  They draw no random numbers: seeds come
in tensors, from `torch.randint`, which a compiler takes care not to merge, replays and recomputes.

Operators know nothing of derivatives.  Those are in the `autograd.Function` classes below, which also do what
`torch.func` asks for.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import dropout as reference
from ..reference.random import PhiloxPosition
from ..reference.step import compute_dtype
from ..runtime.compile_ahead import LENGTH, compile_ahead
from ..runtime.device import aligned, architecture, triton_dtype
from ..runtime.device import launch as launch_kernel
from ..runtime.launch_parameters import LaunchParameters, launch_parameters
from . import _elementwise as elementwise
from ._elementwise import Parts, one_by_one

# Operators --------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastreg::dropout", mutates_args=())
def dropout(
    x: Tensor, seed: Tensor, thresholds: Tensor, inner: int, noise_shape: Sequence[int] | None
) -> Tensor:
    """What stays of x, scaled; 0 elsewhere.

    Args:
        x: Any shape; its elements count in row-major order.
        seed: int64, 0-d.
        thresholds: int32, 0-d, or `[channels]`: rates times 65536.
        inner: Elements that follow each other in a channel, channels in turn.
        noise_shape: The shape of the mask, where that is broadcast.
    """
    if noise_shape is None:
        return _forward(x, None, None, seed, thresholds, inner, "identity")
    return _masked(x, seed, thresholds, inner, noise_shape)


@dropout.register_fake
def _(x: Tensor, seed: Tensor, thresholds: Tensor, inner: int, noise_shape: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("fastreg::dropout_", mutates_args=("x",))
def dropout_(
    x: Tensor, seed: Tensor, thresholds: Tensor, inner: int, noise_shape: Sequence[int] | None
) -> None:
    """The same in place."""
    if noise_shape is None and x.is_contiguous():
        _forward(x, None, None, seed, thresholds, inner, "identity", out=x)
    else:
        x.copy_(dropout(x, seed, thresholds, inner, noise_shape))


@torch.library.custom_op("fastreg::bias_act_dropout_add", mutates_args=())
def bias_act_dropout_add(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor, thresholds: Tensor, inner: int,
    activation: str,
) -> Tensor:  # fmt: skip
    """residual + dropout(activation(x + bias)); the bias lies along the last dimension."""
    return _forward(x, bias, residual, seed, thresholds, inner, activation)


@bias_act_dropout_add.register_fake
def _(
    x: Tensor, bias: Any, residual: Any, seed: Tensor, thresholds: Tensor, inner: int, activation: str
) -> Tensor:
    return torch.empty_like(x, dtype=_result(x, residual), memory_format=torch.contiguous_format)


@torch.library.custom_op("fastreg::bias_act_dropout_backward", mutates_args=())
def bias_act_dropout_backward(
    gradient: Tensor, x: Tensor, bias: Tensor | None, seed: Tensor, thresholds: Tensor, inner: int,
    activation: str,
) -> Tensor:  # fmt: skip
    """The gradient by x."""
    return _run(x, bias, None, gradient, seed, thresholds, inner, activation, x.dtype)


@bias_act_dropout_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, bias: Any, seed: Tensor, thresholds: Tensor, inner: int, activation: str
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _result(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _forward(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor, thresholds: Tensor, inner: int,
    activation: str, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return _run(x, bias, residual, None, seed, thresholds, inner, activation, _result(x, residual), out)


def _masked(x: Tensor, seed: Tensor, thresholds: Tensor, inner: int, noise_shape: Sequence[int]) -> Tensor:
    ones = torch.ones(tuple(noise_shape), dtype=compute_dtype(x.dtype), device=x.device)
    factors = _forward(ones, None, None, seed, thresholds, inner, "identity")
    return torch.where(factors != 0, x, 0).mul_(factors).contiguous()


# What runs them ---------------------------------------------------------------------------------------------


def _run(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, gradient: Tensor | None, seed: Tensor,
    thresholds: Tensor, inner: int, activation: str, dtype: torch.dtype, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`reference.dropout`, or with a gradient `reference.dropout_backward`, by the backend's way.

    Args:
        x: Any shape.
        bias: `[columns]`, if there is one.
        residual: Of the shape of x, if there is one.
        gradient: Of the shape of x, of the result, in the backward pass.
        seed: int64, 0-d.
        thresholds: int32, 0-d or `[channels]`.
        inner: Elements that follow each other in a channel.
        activation: Of `reference.activations`.
        dtype: Of the result.
        out: Where it goes, contiguous; may be x.
    """
    x = x.contiguous()
    bias, residual, gradient = (t if t is None else t.contiguous() for t in (bias, residual, gradient))
    known = elementwise.known_seed(seed)

    def plain(parts: Parts, first: int) -> Tensor:
        part, beside, g = parts
        return _plain(part, bias, beside, g, known, thresholds, first, inner, activation, dtype)

    def compiled() -> Callable[[], Tensor]:
        held = x, bias, residual, gradient
        dtypes = tuple(t if t is None else t.dtype for t in held)
        threads = torch.get_num_threads()
        fused = _compiled(dtypes, bool(thresholds.dim()), activation, dtype, seed.device, threads)
        flat = [t.view(-1) for t in held if t is not None]
        return functools.partial(fused, flat, seed, thresholds, torch.tensor(inner, device=seed.device))

    def fill(out: Tensor) -> None:
        launch(x, bias, residual, gradient, seed, thresholds, inner, activation, out)

    return elementwise.run((x, residual, gradient), dtype, out, plain, compiled, fill)


def _plain(
    x: Any, bias: Tensor | None, residual: Tensor | None, gradient: Tensor | None, seed: Tensor | int,
    thresholds: Tensor, first: int, inner: int | Tensor, activation: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """For a run of elements that starts at `first`, a multiple of 8."""
    own = None if bias is None else reference.spread(bias, 1, first, len(x))
    if thresholds.dim():
        thresholds = reference.spread(thresholds, inner, first, len(x))
    at = PhiloxPosition(first, 0, 0, 0)
    if gradient is None:
        return reference.dropout(x, own, residual, seed, thresholds, at, activation, dtype)
    return reference.dropout_backward(gradient, x, own, seed, thresholds, at, activation, dtype)


@functools.cache
def _compiled(
    dtypes: tuple[torch.dtype | None, ...], channels: bool, activation: str, dtype: torch.dtype,
    device: torch.device, threads: int,
) -> Callable[..., Tensor]:  # fmt: skip
    """The reference compiled for these dtypes and any size.

    Args:
        dtypes: Of x, bias, residual and gradient; `None` for those that are not there.
        channels: Whether every channel has its own threshold.
        activation: See `_run`.
        dtype: Of the result.
        device: Where all are.
        threads: `torch.get_num_threads()`, which Inductor builds in.
    """

    def body(flat: list[Tensor], seed: Tensor, thresholds: Tensor, inner: Tensor) -> Tensor:
        left = iter(flat)
        x, bias, residual, gradient = (held if held is None else next(left) for held in dtypes)
        return _plain(x, bias, residual, gradient, seed, thresholds, 0, inner, activation, dtype)

    flat = [
        torch.zeros(size, dtype=held, device=device)
        for size, held in zip((LENGTH, 769, LENGTH, LENGTH), dtypes, strict=True)
        if held is not None
    ]
    seed, inner = torch.zeros((), dtype=torch.int64, device=device), torch.tensor(1, device=device)
    thresholds = torch.zeros(773 if channels else (), dtype=torch.int32, device=device)
    return compile_ahead(body, (flat, seed, thresholds, inner))


def launch(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, gradient: Tensor | None, seed: Tensor,
    thresholds: Tensor, inner: int, activation: str, out: Tensor,
) -> None:  # fmt: skip
    """Fill `out` with the kernel; the arguments are those of `_run`, contiguous."""
    kernels = importlib.import_module("fastreg_kernels.dropout")
    target = architecture(out.device)
    chosen = launch_parameters("dropout", target)
    block = chosen.block_for(out.numel(), target)
    filled = aligned(out)
    given = (t if t is None else aligned(t) for t in (x, bias, residual, gradient))
    launch_kernel(
        kernels.dropout_kernel, -(-out.numel() // block), out.device,
        *given, filled, seed, aligned(thresholds), out.numel(), inner, block // chosen.chunk(target.lanes),
        **constants(bias, thresholds, inner, activation, out.dtype, chosen, target.lanes), **chosen.options,
    )  # fmt: skip
    if filled is not out:
        out.copy_(filled)


def constants(
    bias: Tensor | None, thresholds: Tensor, inner: int, activation: str, dtype: torch.dtype,
    chosen: LaunchParameters, lanes: int,
) -> dict[str, Any]:  # fmt: skip
    """The compile-time arguments of the kernel, for warps of so many lanes."""
    tl = importlib.import_module("triton.language")
    return {
        "ACTIVATION": activation,
        "COLUMNS": 1 if bias is None else bias.numel(),
        "CHANNELS": thresholds.numel() if thresholds.dim() else 0,
        "INDEX": tl.int32 if inner * thresholds.numel() < 2**30 else tl.int64,
        "COMPUTE": triton_dtype(compute_dtype(dtype)),
        "CHUNK": chosen.chunk(lanes),
    }


# Derivatives ------------------------------------------------------------------------------------------------


class Dropout(torch.autograd.Function):
    """`fastreg::dropout`, which is its own derivative, of any order.

    What is saved for the backward pass are seed and thresholds: 12 bytes with one rate for all.
    """

    @staticmethod
    def forward(
        x: Tensor, seed: Tensor, thresholds: Tensor, inner: int, noise_shape: Sequence[int] | None
    ) -> Tensor:
        """Asks the operator."""
        return dropout(x, seed, thresholds, inner, noise_shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps what the mask follows from."""
        _, seed, thresholds, ctx.inner, ctx.noise_shape = inputs
        ctx.save_for_backward(seed, thresholds)
        ctx.save_for_forward(seed, thresholds)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The same to the gradient."""
        return Dropout.apply(gradient, *ctx.saved_tensors, ctx.inner, ctx.noise_shape), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """See `_one_mask_or_many`."""
        return _one_mask_or_many(Dropout, info, in_dims, *inputs)


class ForwardDropout(Dropout):
    """With forward-mode derivatives of all that it does, which Dynamo does not take."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The same to the gradient."""
        found = ForwardDropout.apply(gradient, *ctx.saved_tensors, ctx.inner, ctx.noise_shape)
        return found, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        """The same to the tangent."""
        return ForwardDropout.apply(tangent, *ctx.saved_tensors, ctx.inner, ctx.noise_shape)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """See `_one_mask_or_many`."""
        return _one_mask_or_many(ForwardDropout, info, in_dims, *inputs)


def _one_mask_or_many(
    function: Any, info: Any, in_dims: tuple[Any, ...], x: Tensor, seed: Tensor, thresholds: Tensor,
    inner: int, noise_shape: Sequence[int] | None,
) -> tuple[Tensor, int]:  # fmt: skip
    """One mask for all where the seed is one for all, as with `randomness="same"`."""
    of_x, of_seed, of_thresholds, *_ = in_dims
    if of_seed is not None or of_thresholds is not None:
        return one_by_one(function, info, in_dims, (x, seed, thresholds, inner, noise_shape))
    x = x.movedim(of_x, 0)
    shape = (1, *(x.shape[1:] if noise_shape is None else noise_shape))
    return function.apply(x, seed, thresholds, inner, shape), 0


class InplaceDropout(torch.autograd.Function):
    """`fastreg::dropout_`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, seed: Tensor, thresholds: Tensor, inner: int, noise_shape: Sequence[int] | None
    ) -> Tensor:
        """Changes x."""
        ctx.mark_dirty(x)
        ctx.save_for_backward(seed, thresholds)
        ctx.inner, ctx.noise_shape = inner, noise_shape
        dropout_(x, seed, thresholds, inner, noise_shape)
        return x

    backward = Dropout.backward


class BiasActDropoutAdd(torch.autograd.Function):
    """`fastreg::bias_act_dropout_add`; keeps x only for an activation's derivative."""

    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor, thresholds: Tensor, inner: int,
        activation: str,
    ) -> Tensor:  # fmt: skip
        """Asks the operator."""
        return bias_act_dropout_add(x, bias, residual, seed, thresholds, inner, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps what the mask follows from, and what the activation was given."""
        x, bias, residual, seed, thresholds, ctx.inner, ctx.activation = inputs
        kept = (None, None) if ctx.activation == "identity" else (x, bias)
        ctx.save_for_backward(*kept, seed, thresholds)
        ctx.dtypes = [t if t is None else t.dtype for t in (x, bias, residual)]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """By x, by the bias as a sum over all but the last dimension, and by the residual."""
        x, bias, *mask = ctx.saved_tensors
        of_x, of_bias, of_residual = ctx.dtypes
        g = b = r = None
        if any(ctx.needs_input_grad[:2]):
            if ctx.activation == "identity":
                g = Dropout.apply(gradient, *mask, ctx.inner, None).to(of_x)
            else:
                g = _BiasActDropoutBackward.apply(gradient, x, bias, *mask, ctx.inner, ctx.activation)
        if ctx.needs_input_grad[1]:
            assert g is not None
            b = g[None].flatten(0, -2).sum(0, dtype=torch.promote_types(of_bias, torch.float32)).to(of_bias)
        if ctx.needs_input_grad[2]:
            r = gradient.to(of_residual)
        return g if ctx.needs_input_grad[0] else None, b, r, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """Each sample on its own."""
        return one_by_one(BiasActDropoutAdd, info, in_dims, inputs)


class _BiasActDropoutBackward(torch.autograd.Function):
    """`fastreg::bias_act_dropout_backward`, which has no derivative."""

    @staticmethod
    def forward(
        gradient: Tensor, x: Tensor, bias: Tensor | None, seed: Tensor, thresholds: Tensor, inner: int,
        activation: str,
    ) -> Tensor:  # fmt: skip
        return bias_act_dropout_backward(gradient, x, bias, seed, thresholds, inner, activation)

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
        return one_by_one(_BiasActDropoutBackward, info, in_dims, inputs)
