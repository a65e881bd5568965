"""Modules that add noise while training: to continuous inputs and activations, and to tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.noise import add_noise
from . import noise_functional as functional
from . import rates
from .dropout import _DropoutBase
from .rates import Rate


class _NoiseBase(nn.Module):
    """Base of modules with a level of noise: a number to read and set, and a tensor to compute with.

    The tensor is neither saved nor rounded by `.bfloat16()`, and a new level compiles nothing anew.
    """

    level: Tensor
    _level = 0.0

    def _set(self, value: float, name: str) -> None:
        if isinstance(value, Tensor):
            raise TypeError(f"{name} must be a number, got a tensor; it is kept in one")
        self._level = functional.checked_level(value, name)
        held = self._buffers.get("level")
        if held is None:
            self.register_buffer("level", torch.tensor(self._level, dtype=torch.float32), persistent=False)
        else:
            with torch.no_grad():
                held.fill_(self._level)

    @property
    def idle(self) -> bool:
        """Whether nothing is done, as far as the host knows; compiled code asks the tensor."""
        return not self.training or (not torch.compiler.is_compiling() and self._level == 0)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if not self.level.is_meta:  # after `to_empty` it would hold anything, after `bfloat16` too little
            self.level = torch.full_like(self.level, self._level, dtype=torch.float32)
        return self


class ActivationNoise(_NoiseBase):
    """Gaussian noise on activations while training: x + std · N(0, 1), or x · (1 + std · N(0, 1)).

    Multiplicative noise is Gaussian dropout: std = √(p / (1 - p)) for a rate of p.  See
    `functional.gaussian_noise`; `attach_activation_noise` does the same to modules of a model as it is.
    `std` may be set at any time but between a forward pass and its backward pass, and compiles nothing anew.

    Args:
        std: Standard deviation, >= 0: in units of the activations, or as a share of them.
        kind: `"additive"` or `"multiplicative"`.

    Raises:
        ValueError: If std is out of range, or there is no such kind.

    Shape:
        Any, and the same.

    Reference:
        Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting", §10.
    """

    def __init__(self, std: float = 0.1, kind: str = "additive") -> None:
        super().__init__()
        self.std, self.kind = std, functional.known_kind(kind)

    @property
    def std(self) -> float:
        """The standard deviation."""
        return self._level

    @std.setter
    def std(self, value: float) -> None:
        self._set(value, "std")

    def forward(self, input: Tensor) -> Tensor:
        """The input with noise; as it is when not training.

        Raises:
            TypeError: If it is not of a floating dtype.
        """
        return input if self.idle else add_noise(input, self.level, self.kind)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"std={self.std}, kind={self.kind!r}"


class InputNoise(ActivationNoise):
    """Gaussian noise on continuous inputs while training, such as pixels, waveforms and measurements.

    As `ActivationNoise`, and refuses integers: noise of 0.01 on a token id, rounded down again, changes
    nothing or makes it the token before.  Tokens take `TokenNoise`, their embeddings `EmbeddingNoise`.

    Args:
        std: Standard deviation, >= 0: in units of the inputs, or as a share of them.
        kind: `"additive"` or `"multiplicative"`.

    Raises:
        ValueError: If std is out of range, or there is no such kind.

    Shape:
        Any, and the same.

    Reference:
        Bishop 1995, "Training with noise is equivalent to Tikhonov regularization".
    """

    def forward(self, input: Tensor) -> Tensor:
        """The input with noise; as it is when not training.

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
    """Replaces tokens by random ones while training, at a rate: noise for inputs that are no quantities.

    Adding 0.01 to integer ids and truncating changes nothing (and subtracting it makes each the id before):
    ids have no distances.  Each token is replaced with probability `rate` by one that is drawn evenly from
    all that are not special, the one that was there among them.  Special tokens and padding stay.  Labels
    are the caller's: of a causal model they remain the tokens as they were.

    Args:
        rate: In [0, 1], realised to 1/65536.  May be set at any time, and compiles nothing anew.
        vocab_size: How many tokens there are.
        special_tokens: Ids that are neither replaced nor drawn, such as `tokenizer.all_special_ids`.

    Raises:
        ValueError: If the rate or a special token is out of range.

    Shape:
        Tokens of an integer dtype and any shape, and the same.

    Reference:
        Xie et al. 2017, "Data noising as smoothing in neural network language models".
    """

    special: Tensor

    def __init__(self, rate: float, vocab_size: int, special_tokens: Sequence[int] = ()) -> None:
        super().__init__()
        self.rate, self.vocab_size = rate, int(vocab_size)
        self.special_tokens = tuple(functional.checked_special(special_tokens, self.vocab_size))
        special = torch.tensor(self.special_tokens, dtype=torch.int64)
        self.register_buffer("special", special, persistent=False)

    @property
    def rate(self) -> float:
        """The rate."""
        return self._p

    @rate.setter
    def rate(self, value: Rate) -> None:
        self.p = rates.check_rate(value, "rate")

    def forward(self, input: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The tokens, some replaced; as they are when not training.

        Args:
            input: Tokens.
            attention_mask: Of their shape: where it is 0, they stay.

        Raises:
            TypeError: If the input is not of an integer dtype.
            ValueError: If the mask has another shape, or the dtype does not hold every token.
        """
        if self.idle:
            return input
        return functional.replaced(input, self.drop_thresholds, self.vocab_size, self.special, attention_mask)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if not self.special.is_meta:
            self.special.copy_(torch.tensor(self.special_tokens, dtype=torch.int64))
        return self

    def extra_repr(self) -> str:
        """The arguments."""
        special = f", special_tokens={self.special_tokens}" if self.special_tokens else ""
        return f"rate={self.rate}, vocab_size={self.vocab_size}{special}"
