"""Defines modules that add noise while training: to inputs and activations, and to tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.validation import check_choice, check_int, check_range
from ..ops.noise import add_noise
from . import functional
from .dropout import _DropoutBase, rate_property

ARTICLES = {"alpha": "an alpha", "std": "a std"}
"""Names of levels of noise, with their articles."""


class _NoiseBase(nn.Module):
    """Base of modules with a level of noise: a number to read and set, and a tensor to compute with.

    The tensor is neither saved nor rounded by `.bfloat16()`, and a new level needs no compilation.
    """

    level: Tensor
    level_name = "std"
    _level = 0.0

    def _set(self, value: float, name: str) -> None:
        if isinstance(value, Tensor):
            raise TypeError(f"{name} must be a number, got a tensor; it is kept in one")
        self._level = check_range(name, value, 0)
        buffer = self._buffers.get("level")
        if buffer is None:
            self.register_buffer("level", torch.tensor(self._level, dtype=torch.float32), persistent=False)
        else:
            with torch.no_grad():
                buffer.fill_(self._level)

    def silence(self) -> None:
        """Sets the level to 0, whatever its name."""
        self._set(0.0, "level")

    @property
    def idle(self) -> bool:
        """Whether no noise is added, as far as the host knows; compiled code reads the tensor."""
        return not self.training or (not torch.compiler.is_compiling() and self._level == 0)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if not self.level.is_meta:  # after `to_empty` it is arbitrary, after `bfloat16` inexact
            self.level = torch.full_like(self.level, self._level, dtype=torch.float32)
        return self


def level_property(name: str) -> Any:
    """Returns a property for the level of a module of noise, `None` if it has another name."""

    def read(noise: _NoiseBase) -> float | None:
        return noise._level if noise.level_name == name else None

    def write(noise: _NoiseBase, value: float) -> None:
        if noise.level_name != name:
            raise AttributeError(f"this noise has {ARTICLES[noise.level_name]}, not {ARTICLES[name]}")
        noise._set(value, name)

    return property(read, write, doc=f"The {name} of the noise, >= 0; may be set at any time.")


class ActivationNoise(_NoiseBase):
    """Adds Gaussian noise to activations while training: x + std · N(0, 1), or x · (1 + std · N(0, 1)).

    Multiplicative noise is Gaussian dropout: std = √(p / (1 - p)) for a rate of p.  See
    `functional.gaussian_noise`; `attach_activation_noise` does this in an existing model.  `std` may be set
    at any time but between a forward pass and its backward pass, and needs no compilation.

    Args:
        std: Standard deviation, >= 0: in units of the activations, or as a share of them.
        kind: `"additive"` or `"multiplicative"`.

    Raises:
        ValueError: If std is out of range, or there is no such kind.

    Shape:
        Any; the output has the same.

    Reference:
        Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting", §10.
    """

    std = level_property("std")

    def __init__(self, std: float = 0.1, kind: str = "additive") -> None:
        super().__init__()
        check_choice("kind", kind, functional.GAUSSIAN_KINDS)
        self.std, self.kind = std, kind

    def forward(self, input: Tensor) -> Tensor:
        """Adds noise to the input while training.

        Raises:
            TypeError: If it is not of a floating dtype.
        """
        return input if self.idle else add_noise(input, self.level, self.kind)

    def extra_repr(self) -> str:
        """Returns the arguments for `repr`."""
        return f"std={self.std}, kind={self.kind!r}"


class InputNoise(ActivationNoise):
    """Adds Gaussian noise to continuous inputs while training, such as pixels, waveforms and measurements.

    Works as `ActivationNoise`, but refuses integers: noise of 0.01 on a token id, rounded down, leaves it or
    makes it the id before.  Use `TokenNoise` for tokens, and `EmbeddingNoise` for their embeddings.

    Args:
        std: Standard deviation, >= 0: in units of the inputs, or as a share of them.
        kind: `"additive"` or `"multiplicative"`.

    Raises:
        ValueError: If std is out of range, or there is no such kind.

    Shape:
        Any; the output has the same.

    Reference:
        Bishop 1995, "Training with noise is equivalent to Tikhonov regularization".
    """

    def forward(self, input: Tensor) -> Tensor:
        """Adds noise to the input while training.

        Raises:
            TypeError: If it is not of a floating dtype, whether training or not.
        """
        if not input.is_floating_point():
            raise TypeError(
                f"InputNoise needs continuous inputs of a floating dtype, got {input.dtype}; for tokens use "
                "fastreg.nn.TokenNoise or fastreg.nn.attach_embedding_noise, for images .float() first"
            )
        return super().forward(input)


class TokenNoise(_DropoutBase):
    """Replaces tokens by random ones while training, at a rate: noise for ids, which have no distances.

    Each token is replaced with probability `rate` by one that is drawn evenly from all that are not special,
    itself included.  Special tokens and padding stay.  Labels do not change: those of a causal model remain
    the original tokens.

    Args:
        rate: In [0, 1], rounded to 1/65536.  May be set at any time, and needs no compilation.
        vocab_size: Number of tokens in the vocabulary.
        special_tokens: Ids that are neither replaced nor drawn, such as `tokenizer.all_special_ids`.

    Raises:
        ValueError: If the rate or a special token is out of range.

    Shape:
        Tokens of an integer dtype and any shape; the output has the same.

    Reference:
        Xie et al. 2017, "Data noising as smoothing in neural network language models".
    """

    special: Tensor
    rate = rate_property("rate")

    def __init__(self, rate: float, vocab_size: int, special_tokens: Sequence[int] = ()) -> None:
        super().__init__()
        self.rate, self.vocab_size = rate, check_int("vocab_size", vocab_size)
        self.special_tokens = tuple(functional.check_special_tokens(special_tokens, self.vocab_size))
        special = torch.tensor(self.special_tokens, dtype=torch.int64)
        self.register_buffer("special", special, persistent=False)

    def silence(self) -> None:
        """Sets the rate of replacement to 0."""
        self.rate = 0.0

    def forward(self, input: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Replaces some of the tokens while training.

        Args:
            input: Tokens.
            attention_mask: Of the shape of the tokens: where it is 0, they stay.

        Raises:
            TypeError: If the input is not of an integer dtype.
            ValueError: If the mask has another shape, or the dtype does not hold every token.
        """
        if self.idle:
            return input
        return functional.replace_tokens(
            input, self.drop_thresholds, self.vocab_size, self.special, attention_mask
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if not self.special.is_meta:
            self.special.copy_(torch.tensor(self.special_tokens, dtype=torch.int64))
        return self

    def extra_repr(self) -> str:
        """Returns the arguments for `repr`."""
        special = f", special_tokens={self.special_tokens}" if self.special_tokens else ""
        return f"rate={self.rate}, vocab_size={self.vocab_size}{special}"
