"""Dropout and noise as functions: of elements, channels and samples, plain and fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.validation import check_choice
from ..ops import dropout as dropout_ops
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
    """Sets each element to 0 with probability p, and scales the others by 1 / (1 - p).

    Works as `torch.nn.functional.dropout` does, but the mask is not stored: the backward pass computes it
    again.  For one seed, which `torch.manual_seed` sets, it is the same on a CPU and on any GPU.  p is
    rounded to 1/65536, and elements are scaled by the rounded rate.  A dropped element is 0 even if it was
    infinite or NaN.  p is not differentiated.

    Args:
        input: Any shape, of a floating dtype.
        p: The rate in [0, 1]; or one for each channel, a list or tensor `[input.shape[dim]]`.
        training: Whether to drop; if not, the input is returned.
        inplace: Whether to change the input.
        dim: The dimension of the channels.
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
    rates.check_rates(p)
    if not training:
        if return_mask:
            shape = input.shape if noise_shape is None else noise_shape
            return input, torch.ones(tuple(shape), dtype=torch.bool, device=input.device)
        return input
    return dropout_ops.drop(
        input, rates.drop_thresholds(p, input.device), inplace, dim=dim, noise_shape=noise_shape,
        return_mask=return_mask,
    )  # fmt: skip


def bias_act_dropout_add(
    x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, p: Rate = 0.5,
    training: bool = True, activation: str = "identity",
) -> Tensor:  # fmt: skip
    """Computes residual + dropout(activation(x + bias)) in one pass.

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
    rates.check_rates(p)
    check_choice("activation", activation, ACTIVATIONS)
    drop_thresholds = rates.drop_thresholds(p, x.device) if training else None
    return dropout_ops.fused_drop(x, bias, residual, drop_thresholds, activation)


def dropout_add(x: Tensor, residual: Tensor, p: Rate = 0.5, training: bool = True) -> Tensor:
    """Computes residual + dropout(x), see `bias_act_dropout_add`."""
    return bias_act_dropout_add(x, None, residual, p, training)


def bias_dropout_add(
    x: Tensor, bias: Tensor, residual: Tensor, p: Rate = 0.5, training: bool = True
) -> Tensor:
    """Computes residual + dropout(x + bias), see `bias_act_dropout_add`."""
    return bias_act_dropout_add(x, bias, residual, p, training)


def bias_act_dropout(
    x: Tensor, bias: Tensor, p: Rate = 0.5, training: bool = True, activation: str = "gelu"
) -> Tensor:
    """Computes dropout(activation(x + bias)), see `bias_act_dropout_add`."""
    return bias_act_dropout_add(x, bias, None, p, training, activation)


def drop_path(
    input: Tensor, drop_prob: float = 0.0, training: bool = True, scale_by_keep: bool = True
) -> Tensor:
    """Sets whole samples to 0 with probability `drop_prob`, and scales the others by 1 / (1 - drop_prob).

    Args:
        input: `[batch, ...]`, the output of a residual branch.
        drop_prob: The rate in [0, 1].
        training: Whether to drop; if not, the input is returned.
        scale_by_keep: Whether to scale.

    Raises:
        ValueError: If the rate is out of range.

    Reference:
        Huang et al. 2016, "Deep networks with stochastic depth".
    """
    rates.check_rate(drop_prob, "drop_prob")
    if not training or drop_prob == 0:
        return input
    return dropout_ops.drop_samples(input, rates.drop_thresholds(drop_prob, input.device), scale_by_keep)
