"""Dropout as functions, plain and fused, of elements, channels and samples; and noise.

Those with rates as thresholds in tensors are what the modules call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import dropout as dropout_ops
from ..ops._elementwise import draw_seed, transformed
from ..reference.activations import ACTIVATIONS
from . import rates
from .noise_functional import gaussian_noise as gaussian_noise
from .noise_functional import token_noise as token_noise
from .noise_functional import uniform_noise as uniform_noise
from .rates import Rate


def dropout(
    input: Tensor, p: Rate = 0.5, training: bool = True, inplace: bool = False, *, dim: int = -1,
    noise_shape: Sequence[int] | None = None, return_mask: bool = False,
) -> Any:  # fmt: skip
    """Dropout: each element becomes 0 with probability p, and the others are scaled by 1 / (1 - p).

    As `torch.nn.functional.dropout`, and: the mask is not stored but worked out again in the backward pass.
    It is the same on a CPU and on any GPU for the same seed, which `torch.manual_seed` rules.  p is realised
    to 1/65536, and what stays is scaled by the rate that is realised.  What is dropped is 0 even where it was
    infinite or NaN.  p is not differentiated.

    Args:
        input: Any shape, of a floating dtype.
        p: The rate in [0, 1]; or one for each channel, a list or tensor `[input.shape[dim]]`.
        training: If not, the input is returned.
        inplace: Whether to change the input.
        dim: Where the channels are.
        noise_shape: The shape of the mask, each size 1 or that of the input: `(n, 1, d)` drops the same
            features at all positions, `(n, 1, 1)` whole samples.
        return_mask: Whether to return `(output, mask)`, with a bool of the shape of the mask.

    Returns:
        The output, of the shape and dtype of the input.

    Raises:
        TypeError: If the input is not of a floating dtype.
        ValueError: If a rate is out of range, or a shape does not fit.

    Reference:
        Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting".
    """
    rates.checked(p)
    if not training:
        if return_mask:
            shape = input.shape if noise_shape is None else noise_shape
            return input, torch.ones(tuple(shape), dtype=torch.bool, device=input.device)
        return input
    return by_thresholds(
        input, rates.thresholds(p, input.device), inplace, dim=dim, noise_shape=noise_shape,
        return_mask=return_mask,
    )  # fmt: skip


def by_thresholds(
    input: Tensor, thresholds: Tensor, inplace: bool = False, *, dim: int = -1,
    noise_shape: Sequence[int] | None = None, return_mask: bool = False, seed: Tensor | None = None,
) -> Any:  # fmt: skip
    """`dropout` with rates as an int32 tensor, see `rates.thresholds`, on the device of the input."""
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
    inner = inner_of(shape, thresholds, dim)
    if seed is None:
        seed = draw_seed(input.device)
    if inplace and not torch.compiler.is_compiling() and not transformed():
        out = dropout_ops.InplaceDropout.apply(input, seed, thresholds, inner, noise_shape)
    else:
        kind = dropout_ops.Dropout if torch.compiler.is_compiling() else dropout_ops.ForwardDropout
        out = kind.apply(input, seed, thresholds, inner, noise_shape)
        if inplace:
            out = input.copy_(out)
    if not return_mask:
        return out
    ones = torch.ones(tuple(shape), dtype=torch.float32, device=input.device)
    return out, dropout_ops.dropout(ones, seed, thresholds, inner, None) != 0


def bias_act_dropout_add(
    x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, p: Rate = 0.5,
    training: bool = True, activation: str = "identity",
) -> Tensor:  # fmt: skip
    """The sum of the residual and of dropout(activation(x + bias)), in one pass.

    Args:
        x: `[..., features]`, of a floating dtype.
        bias: `[features]`.
        residual: Of the shape of x; the result has the wider dtype of both.
        p: The rate in [0, 1], or one for each feature.
        training: Whether to drop.
        activation: `"identity"`, `"relu"`, `"gelu"`, `"gelu_tanh"` or `"silu"`.

    Returns:
        Of the shape of x.  With an activation it can be differentiated once.

    Raises:
        TypeError: If x is not of a floating dtype.
        ValueError: For shapes that do not fit, an unknown activation, and rates out of range.
    """
    rates.checked(p)
    return fused_by_thresholds(
        x, bias, residual, rates.thresholds(p, x.device) if training else None, activation
    )


def dropout_add(x: Tensor, residual: Tensor, p: Rate = 0.5, training: bool = True) -> Tensor:
    """The sum of the residual and of dropout(x), see `bias_act_dropout_add`."""
    return bias_act_dropout_add(x, None, residual, p, training)


def bias_dropout_add(
    x: Tensor, bias: Tensor, residual: Tensor, p: Rate = 0.5, training: bool = True
) -> Tensor:
    """The sum of the residual and of dropout(x + bias), see `bias_act_dropout_add`."""
    return bias_act_dropout_add(x, bias, residual, p, training)


def bias_act_dropout(
    x: Tensor, bias: Tensor, p: Rate = 0.5, training: bool = True, activation: str = "gelu"
) -> Tensor:
    """Dropout(activation(x + bias)), see `bias_act_dropout_add`."""
    return bias_act_dropout_add(x, bias, None, p, training, activation)


def fused_by_thresholds(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, thresholds: Tensor | None, activation: str
) -> Tensor:
    """`bias_act_dropout_add` with rates as an int32 tensor, see `rates.thresholds`, on the device of x.

    `None` keeps everything, and draws no random number.
    """
    if not x.is_floating_point():
        raise TypeError(f"dropout needs a floating dtype, got {x.dtype}")
    known_activation(activation)
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(
            f"bias must have shape {tuple(x.shape[-1:])}, as x has features, got {tuple(bias.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of x, got {tuple(residual.shape)} and {tuple(x.shape)}; "
            "use .expand_as(x)"
        )
    if thresholds is None:
        seed = torch.zeros((), dtype=torch.int64, device=x.device)
        thresholds = torch.zeros((), dtype=torch.int32, device=x.device)
    else:
        seed = draw_seed(x.device)
    inner = inner_of(x.shape, thresholds, -1)
    return dropout_ops.BiasActDropoutAdd.apply(x, bias, residual, seed, thresholds, inner, activation)


def drop_path(
    input: Tensor, drop_prob: float = 0.0, training: bool = True, scale_by_keep: bool = True
) -> Tensor:
    """Whole samples become 0 with probability `drop_prob`, and the others are scaled by 1 / (1 - drop_prob).

    Args:
        input: `[batch, ...]`, what a residual branch adds.
        drop_prob: The rate in [0, 1].
        training: If not, the input is returned.
        scale_by_keep: Whether to scale.

    Raises:
        ValueError: If the rate is out of range.

    Reference:
        Huang et al. 2016, "Deep networks with stochastic depth".
    """
    rates.single(drop_prob, "drop_prob")
    if not training or drop_prob == 0:
        return input
    return path_by_threshold(input, rates.thresholds(drop_prob, input.device), scale_by_keep)


def path_by_threshold(input: Tensor, threshold: Tensor, scale_by_keep: bool = True) -> Tensor:
    """`drop_path` with the rate as an int32 tensor, see `rates.thresholds`."""
    shape = (*input.shape[:1], *[1] * (input.dim() - 1))
    if scale_by_keep:
        return by_thresholds(input, threshold, noise_shape=shape)
    seed = draw_seed(input.device)
    factors = dropout_ops.dropout(torch.ones(shape, device=input.device), seed, threshold, 1, None)
    return torch.where(factors != 0, input, 0)


def known_activation(name: str) -> str:
    """The name.

    Raises:
        ValueError: If there is no such activation.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {name!r}")
    return name


def inner_of(shape: Sequence[int], thresholds: Tensor, dim: int) -> int:
    """How many elements follow each other in a channel.

    Raises:
        IndexError: If there is no such dimension.
        ValueError: If there are not as many rates as channels.
    """
    if not thresholds.dim():
        return 1
    if not -len(shape) <= dim < len(shape):
        raise IndexError(f"dim must be in [{-len(shape)}, {len(shape) - 1}], got {dim}")
    if len(thresholds) != shape[dim]:
        raise ValueError(
            f"p has {len(thresholds)} rates, but dimension {dim} of shape {tuple(shape)} has {shape[dim]} "
            "channels"
        )
    inner = 1
    for size in list(shape)[dim % len(shape) + 1 :]:
        inner *= size
    return inner
