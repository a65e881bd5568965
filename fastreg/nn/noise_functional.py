"""Noise as functions, of activations and of tokens.

Those with scales in tensors are what the modules call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.noise import add_noise
from ..reference.dropout import DROP_LEVELS
from . import rates
from .rates import Rate

Level = float | Tensor
"""A number >= 0, or a tensor of these: for all, or for each of the first dimensions of what gets noise."""


def gaussian_noise(
    input: Tensor, std: Level = 0.1, training: bool = True, *, kind: str = "additive",
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gaussian noise on each element: input + std · N(0, 1), or input · (1 + std · N(0, 1)).

    Multiplicative noise is Gaussian dropout: with std = √(p / (1 - p)) its variance is that of dropout at a
    rate of p.  The noise is not stored for the backward pass but drawn again where it is needed, and is the
    same on a CPU and on any GPU for the same seed, which `torch.manual_seed` rules.  16-bit inputs are
    computed in float32.  std is not differentiated.

    Args:
        input: Any shape, of a floating dtype.
        std: Standard deviation, >= 0: in units of the input, or as a share of it.  A tensor of the shape of
            the first dimensions, such as `[batch]`, has a value for each.
        training: If not, the input is returned.
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
    known_kind(kind)
    return _noisy(input, checked_level(std), training, kind, mask)


def uniform_noise(
    input: Tensor, magnitude: Level, training: bool = True, *, mask: Tensor | None = None
) -> Tensor:
    """Uniform noise on each element: input + magnitude · U(-1, 1), of 16 random bits.

    Args:
        input: See `gaussian_noise`.
        magnitude: Its largest absolute value, >= 0; see `std` of `gaussian_noise`.
        training: If not, the input is returned.
        mask: See `gaussian_noise`.

    Returns:
        Of the shape and dtype of the input.

    Raises:
        TypeError: If the input is not of a floating dtype.
        ValueError: If the magnitude is out of range or takes a gradient, or a shape does not fit.
    """
    return _noisy(input, checked_level(magnitude, "magnitude"), training, "uniform", mask)


def token_noise(
    input: Tensor, rate: Rate, vocab_size: int, training: bool = True, *,
    special_tokens: Sequence[int] = (), mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Replaces each token by a random one with probability `rate`.

    The new token is drawn evenly from all that are not special; it may be the one that was there.  Random
    numbers are torch's, ruled by `torch.manual_seed`.  See `TokenNoise`.

    Args:
        input: Tokens, of an integer dtype and any shape.
        rate: In [0, 1], realised to 1/65536.
        vocab_size: How many tokens there are.
        training: If not, the input is returned.
        special_tokens: Those that are neither replaced nor drawn.
        mask: Of the shape of the input: where it is 0 (padding), tokens stay.

    Returns:
        Of the shape and dtype of the input.

    Raises:
        TypeError: If the input is not of an integer dtype.
        ValueError: If the rate or a special token is out of range, the mask has another shape, or the dtype
            does not hold every token.
    """
    rates.check_rate(rate, "rate")
    special = torch.tensor(checked_special(special_tokens, vocab_size), dtype=torch.int64)
    if not training:
        return input
    drop_thresholds = rates.drop_thresholds(rate, input.device)
    return replaced(input, drop_thresholds, vocab_size, special.to(input.device), mask)


def replaced(
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
        # The n-th token that is not special: n, and one more for each special one up to there.
        below = special - torch.arange(len(special), device=input.device)
        token = token + torch.searchsorted(below, token, right=True)
        hit = hit & ~torch.isin(input, special)
    if mask is not None:
        hit = hit & (mask != 0)
    return torch.where(hit, token.to(input.dtype), input)


def spread_level(level: Tensor, mask: Tensor | None, input: Tensor) -> tuple[Tensor, int]:
    """Levels and a mask as the operator takes them: the scale of each row, and the elements of a row.

    Raises:
        ValueError: If their shapes are not those of the first dimensions of the input.
    """
    for name, given in (("the level of noise", level), ("mask", mask)):
        if given is not None and given.shape != input.shape[: given.dim()]:
            raise ValueError(
                f"{name} must have the first sizes of the input, {tuple(input.shape)}, got shape "
                f"{tuple(given.shape)}"
            )
    if mask is not None:
        if level.dim() < mask.dim():
            level = level.view(*level.shape, *[1] * (mask.dim() - level.dim()))
        elif level.dim() > mask.dim():
            mask = mask.view(*mask.shape, *[1] * (level.dim() - mask.dim()))
        level = torch.where(mask != 0, level, 0)
    inner = 1
    for size in input.shape[level.dim() :]:
        inner *= size
    return (level.reshape(-1), inner) if level.dim() else (level, 1)


def _noisy(input: Tensor, level: Level, training: bool, kind: str, mask: Tensor | None) -> Tensor:
    if not training:
        return input
    if isinstance(level, Tensor):
        scale = level.to(input.device)
    else:
        scale = torch.full((), level, dtype=torch.float32, device=input.device)
    scale, inner = spread_level(scale, mask, input)
    return add_noise(input, scale, kind, inner)


def known_kind(kind: str) -> str:
    """The kind of Gaussian noise.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind not in ("additive", "multiplicative"):
        raise ValueError(f"kind must be 'additive' or 'multiplicative', got {kind!r}")
    return kind


def checked_level(level: Any, name: str = "std") -> Any:
    """The level of noise; values of tensors are looked at only where nobody has to be waited for.

    Raises:
        TypeError: If it is no number and no tensor.
        ValueError: If it is negative or not finite, or a tensor that takes a gradient.
    """
    if isinstance(level, Tensor):
        if level.requires_grad:
            raise ValueError(f"{name} is not differentiated: give {name}.detach()")
        if level.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = level[~((level >= 0) & level.isfinite())]
            if wrong.numel():
                raise ValueError(f"{name} must be finite and >= 0, got {wrong.flatten()[0].item()}")
        return level
    if isinstance(level, bool) or not isinstance(level, (int, float)):
        raise TypeError(f"{name} must be a number or a tensor, got {level!r}")
    if not 0 <= level < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {name}={level!r}")
    return float(level)


def checked_special(special_tokens: Sequence[int], vocab_size: int) -> list[int]:
    """Special tokens, sorted.

    Raises:
        ValueError: If one is not in the vocabulary, or all are.
    """
    special = sorted({int(token) for token in special_tokens if token is not None})
    if special and not 0 <= special[0] <= special[-1] < vocab_size:
        raise ValueError(f"special_tokens must be in [0, {vocab_size - 1}], got {special}")
    if len(special) >= vocab_size:
        raise ValueError(
            f"vocab_size must be larger than the number of special tokens, got {vocab_size=} and "
            f"{len(special)} of them"
        )
    return special
