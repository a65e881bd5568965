"""Defines `fastreg.nn.Dropout`, and the base of all modules with a rate."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.validation import check_flag, check_rate
from ..ops.dropout import drop
from . import rates
from .rates import Rate


class _DropoutBase(nn.Module):
    """Base of modules with a rate `p`: a number to read and set, and thresholds in a tensor to compute with.

    The tensor is neither saved nor rounded by `.bfloat16()`, and a new rate needs no compilation.
    """

    drop_thresholds: Tensor
    _p: Any = 0.0

    @property
    def p(self) -> Any:
        """The rate in [0, 1], as it was set."""
        return self._p

    @p.setter
    def p(self, value: Rate) -> None:
        self._p = rates.check_rates(value)
        buffer, thresholds = self._buffers.get("drop_thresholds"), rates.drop_thresholds(value)
        if buffer is None or buffer.shape != thresholds.shape:
            thresholds = thresholds if buffer is None else thresholds.to(buffer.device)
            self.register_buffer("drop_thresholds", thresholds, persistent=False)
        else:
            with torch.no_grad():
                buffer.copy_(thresholds) if thresholds.dim() else buffer.fill_(int(thresholds))

    @property
    def idle(self) -> bool:
        """Whether nothing is dropped, as far as the host knows; compiled code reads the thresholds."""
        if not self.training:
            return True
        return not torch.compiler.is_compiling() and isinstance(self._p, (int, float)) and self._p == 0

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if not self.drop_thresholds.is_meta:  # after `to_empty` its content is arbitrary
            self.p = self._p
        return self


def rate_property(name: str) -> Any:
    """Returns a property for the `p` of a module by a name: a number in [0, 1], not one for each channel."""

    def write(module: _DropoutBase, value: float) -> None:
        _DropoutBase.p.fset(module, check_rate(name, value))  # type: ignore[attr-defined]

    return property(lambda module: module._p, write, doc="The rate in [0, 1]; may be set at any time.")


class Dropout(_DropoutBase, nn.Dropout):
    """Drop-in for `torch.nn.Dropout`: sets elements to 0 with probability p while training.

    See `fastreg.nn.functional.dropout` for the differences, shapes and errors.  The `state_dict` is that of
    `nn.Dropout`.  `p` may be set at any time but between a forward pass and its backward pass, and needs no
    compilation.

    Args:
        p: The rate in [0, 1]; or one for each channel, a list or tensor.
        inplace: Whether to change the input.
        dim: The dimension of the channels.
        noise_shape: The shape of the mask, each size 1, or `None` for that of the input: `(None, 1, None)`
            drops the same features at all positions.

    Reference:
        Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting".
    """

    def __init__(
        self, p: Rate = 0.5, inplace: bool = False, *, dim: int = -1,
        noise_shape: Sequence[int | None] | None = None,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.p = p
        self.inplace, self.dim, self.noise_shape = check_flag("inplace", inplace), dim, noise_shape

    def forward(self, input: Tensor) -> Tensor:
        """Drops elements of the input while training."""
        if self.idle:
            return input
        shape: Any = self.noise_shape
        if shape is not None:
            if len(shape) != input.dim():
                raise ValueError(
                    f"noise_shape {tuple(shape)} does not fit an input of shape {tuple(input.shape)}"
                )
            shape = [b if a is None else a for a, b in zip(shape, input.shape, strict=True)]
        return drop(input, self.drop_thresholds, self.inplace, dim=self.dim, noise_shape=shape)
