"""Dropout and noise as functions: of elements, channels and samples, plain and fused."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.validation import check_choice, check_int, check_range, check_rate
from ..ops import dropout as dropout_ops
from ..ops.noise import add_noise
from ..reference.activations import ACTIVATIONS
from ..reference.dropout import DROP_LEVELS
from . import rates
from .rates import Rate

Level = float | Tensor
"""A number >= 0, or a tensor of these: for all, or for each of the first dimensions of the input."""
GAUSSIAN_KINDS = "additive", "multiplicative"


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
    p = rates.check_rates(p)
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
    p = rates.check_rates(p)
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
    check_rate("drop_prob", drop_prob)
    if not training or drop_prob == 0:
        return input
    return dropout_ops.drop_samples(input, rates.drop_thresholds(drop_prob, input.device), scale_by_keep)


def gaussian_noise(
    input: Tensor, std: Level = 0.1, training: bool = True, *, kind: str = "additive",
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Adds Gaussian noise to each element, input + std · N(0, 1), or multiplies, input · (1 + std · N(0, 1)).

    Multiplicative noise is Gaussian dropout: with std = √(p / (1 - p)) its variance is that of dropout at a
    rate of p.  The noise is not stored for the backward pass but drawn again.  For one seed, which
    `torch.manual_seed` sets, it is the same on a CPU and on any GPU.  16-bit inputs are computed in float32.
    std is not differentiated.

    Args:
        input: Any shape, of a floating dtype.
        std: Standard deviation, >= 0: in units of the input, or as a share of it.  A tensor of the shape of
            the first dimensions, such as `[batch]`, has a value for each.
        training: Whether to add noise; if not, the input is returned.
        kind: `"additive"` or `"multiplicative"`.
        mask: Of the shape of the first dimensions, such as `[batch, length]`: where it is 0, the input stays.

    Returns:
        Of the shape and dtype of the input.

    Raises:
        TypeError: If the input is not of a floating dtype.
        ValueError: If std is out of range or takes a gradient, a shape does not fit, or for another kind.

    Reference:
        Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting", §10;
        Kingma, Salimans, Welling 2015, "Variational dropout and the local reparameterization trick".
    """
    check_choice("kind", kind, GAUSSIAN_KINDS)
    return _noisy(input, check_level(std), training, kind, mask)


def uniform_noise(
    input: Tensor, magnitude: Level, training: bool = True, *, mask: Tensor | None = None
) -> Tensor:
    """Adds uniform noise of 16 random bits to each element: input + magnitude · U(-1, 1).

    Args:
        input: See `gaussian_noise`.
        magnitude: Its largest absolute value, >= 0; see `std` of `gaussian_noise`.
        training: See `gaussian_noise`.
        mask: See `gaussian_noise`.

    Returns:
        Of the shape and dtype of the input.

    Raises:
        TypeError: If the input is not of a floating dtype.
        ValueError: If the magnitude is out of range or takes a gradient, or a shape does not fit.
    """
    return _noisy(input, check_level(magnitude, "magnitude"), training, "uniform", mask)


def _noisy(input: Tensor, level: Level, training: bool, kind: str, mask: Tensor | None) -> Tensor:
    if not training:
        return input
    if isinstance(level, Tensor):
        level = level.to(input.device)
    else:
        level = torch.full((), level, dtype=torch.float32, device=input.device)
    scale, inner = _level_of_rows(level, mask, input)
    return add_noise(input, scale, kind, inner)


def _level_of_rows(level: Tensor, mask: Tensor | None, input: Tensor) -> tuple[Tensor, int]:
    """Returns the level of each row, 0 where masked, and the number of elements of a row."""
    for name, tensor in (("the level of noise", level), ("mask", mask)):
        if tensor is not None and tensor.shape != input.shape[: tensor.dim()]:
            raise ValueError(
                f"{name} must have the first sizes of the input, {tuple(input.shape)}, got shape "
                f"{tuple(tensor.shape)}"
            )
    if mask is not None:
        level = level.view(*level.shape, *[1] * (mask.dim() - level.dim()))
        mask = mask.view(*mask.shape, *[1] * (level.dim() - mask.dim()))
        level = torch.where(mask != 0, level, 0)
    return (level.reshape(-1), math.prod(input.shape[level.dim() :])) if level.dim() else (level, 1)


def token_noise(
    input: Tensor, rate: float, vocab_size: int, training: bool = True, *,
    special_tokens: Sequence[int] = (), mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Replaces each token by a random one with probability `rate`.

    The new token is drawn evenly from all that are not special; it may equal the old one.  Random numbers are
    torch's, set by `torch.manual_seed`.  See `TokenNoise`.

    Args:
        input: Tokens, of an integer dtype and any shape.
        rate: In [0, 1], rounded to 1/65536.
        vocab_size: Number of tokens in the vocabulary.
        training: Whether to replace; if not, the input is returned.
        special_tokens: Those that are neither replaced nor drawn.
        mask: Of the shape of the input: where it is 0 (padding), tokens stay.

    Returns:
        Of the shape and dtype of the input.

    Raises:
        TypeError: If the input is not of an integer dtype.
        ValueError: If the rate or a special token is out of range, the mask has another shape, or the dtype
            does not hold every token.
    """
    check_rate("rate", rate)
    special = torch.tensor(check_special_tokens(special_tokens, vocab_size), dtype=torch.int64)
    if not training:
        return input
    drop_threshold = rates.drop_thresholds(rate, input.device)
    return replace_tokens(input, drop_threshold, vocab_size, special.to(input.device), mask)


def replace_tokens(
    input: Tensor, drop_threshold: Tensor, vocab_size: int, special: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Replaces tokens as `token_noise` does, by a rate as an int32 tensor and sorted special tokens."""
    if input.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise TypeError(
            f"token noise needs tokens of an integer dtype, got {input.dtype}; for continuous inputs use "
            "fastreg.nn.InputNoise"
        )
    if vocab_size - 1 > torch.iinfo(input.dtype).max:
        raise ValueError(f"tokens of {input.dtype} cannot hold those of vocab_size={vocab_size}")
    if mask is not None and mask.shape != input.shape:
        raise ValueError(
            f"mask must have the shape of the tokens, {tuple(input.shape)}, got {tuple(mask.shape)}"
        )
    count = vocab_size - len(special)
    hit = torch.randint(DROP_LEVELS, input.shape, device=input.device) < drop_threshold
    token = torch.randint(count, input.shape, device=input.device)
    if len(special):
        # The n-th token that is not special is n plus the number of special ones up to it.
        below = special - torch.arange(len(special), device=input.device)
        token = token + torch.searchsorted(below, token, right=True)
        hit = hit & ~torch.isin(input, special)
    if mask is not None:
        hit = hit & (mask != 0)
    return torch.where(hit, token.to(input.dtype), input)


def check_level(level: Any, name: str = "std") -> Any:
    """Returns the level of noise if it is finite and >= 0; values on a device are not read.

    Raises:
        TypeError: If it is neither a number nor a tensor.
        ValueError: If it is negative or not finite, or a tensor that takes a gradient.
    """
    if not isinstance(level, Tensor):
        return check_range(name, level, 0)
    if level.requires_grad:
        raise ValueError(f"{name} is not differentiated: give {name}.detach()")
    if level.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = level[~((level >= 0) & level.isfinite())]
        if wrong.numel():
            raise ValueError(f"{name} must be finite and >= 0, got {wrong.flatten()[0].item()}")
    return level


def check_special_tokens(special_tokens: Sequence[int], vocab_size: int) -> list[int]:
    """Returns the special tokens, sorted, if they are part of the vocabulary.

    Raises:
        ValueError: If one is not, or if all tokens are special.
    """
    check_int("vocab_size", vocab_size)
    special = sorted({check_int("special_tokens", t, 0) for t in special_tokens if t is not None})
    if special and special[-1] >= vocab_size:
        raise ValueError(f"special_tokens must be in [0, {vocab_size - 1}], got {special}")
    if len(special) >= vocab_size:
        raise ValueError(
            f"vocab_size must be larger than the number of special tokens, got {vocab_size=} and "
            f"{len(special)} of them"
        )
    return special
