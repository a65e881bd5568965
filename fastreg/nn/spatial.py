"""Dropout of whole channels: drop-ins for `torch.nn.Dropout1d`, `Dropout2d` and `Dropout3d`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .dropout import Rated
from .rates import Rate


class _Spatial(Rated):
    """Base: dimensions behind the channels, and which ranks an input may have."""

    _dims: int
    _ranks: tuple[int, ...]
    inplace: bool

    def __init__(self, p: Rate = 0.5, inplace: bool = False) -> None:
        nn.Module.__init__(self)
        self.p = p
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        """`[batch, channels, ...]`, or `[channels, ...]`, and the same.

        Raises:
            RuntimeError: For other ranks.
        """
        if input.dim() not in self._ranks:
            raise RuntimeError(
                f"{type(self).__name__} expects {' or '.join(map(str, self._ranks))} dimensions, got "
                f"{input.dim()}; fastreg.nn.Dropout(noise_shape=...) takes any"
            )
        if not self.training or (not torch.compiler.is_compiling() and self._p == 0):
            return input
        shape: Any = (*input.shape[: -self._dims], *[1] * self._dims)
        return functional.by_thresholds(
            input, self.thresholds, self.inplace, dim=-self._dims - 1, noise_shape=shape
        )


class Dropout1d(_Spatial, nn.Dropout1d):
    """Zeroes whole channels of `[batch, channels, length]` or `[channels, length]` while training.

    Args:
        p: The rate in [0, 1], or one for each channel.
        inplace: Whether to change the input.

    Reference:
        Tompson et al. 2015, "Efficient object localization using convolutional networks".
    """

    _dims, _ranks = 1, (2, 3)


class Dropout2d(_Spatial, nn.Dropout2d):
    """Zeroes whole channels of `[batch, channels, height, width]` while training.

    Three dimensions are an error: torch takes them for batch, channels and length, and says it will not much
    longer.

    Args:
        p: The rate in [0, 1], or one for each channel.
        inplace: Whether to change the input.

    Reference:
        Tompson et al. 2015, "Efficient object localization using convolutional networks".
    """

    _dims, _ranks = 2, (4,)


class Dropout3d(_Spatial, nn.Dropout3d):
    """Zeroes whole channels of `[batch, channels, depth, height, width]`, or without batch, while training.

    Args:
        p: The rate in [0, 1], or one for each channel.
        inplace: Whether to change the input.

    Reference:
        Tompson et al. 2015, "Efficient object localization using convolutional networks".
    """

    _dims, _ranks = 3, (4, 5)
