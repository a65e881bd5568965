"""Drops whole channels: drop-ins for `torch.nn.Dropout1d`, `Dropout2d` and `Dropout3d`.

Tompson et al. 2015, "Efficient object localization using convolutional networks".
"""

from collections.abc import Callable

from torch import Tensor, nn

from ..ops.dropout import drop
from .dropout import _DropoutBase
from .rates import Rate


class _Spatial(_DropoutBase):
    """Base with the number of dimensions after the channels, and the ranks that torch takes silently."""

    _dims: int
    _ranks: tuple[int, ...]
    _torch: Callable[..., Tensor]
    inplace: bool

    def __init__(self, p: Rate = 0.5, inplace: bool = False) -> None:
        nn.Module.__init__(self)
        self.p = p
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        """Drops channels of the input while training."""
        rank = input.dim()
        if rank not in self._ranks:
            self._torch(input.new_empty([0] * rank), training=False)  # warns or raises, in its own words
        if self.idle:
            return input
        masked = 2 if rank == self._dims + 2 or self._dims == 2 else 1  # batch and channels, or channels
        return drop(
            input, self.drop_thresholds, self.inplace, dim=min(masked, rank) - 1,
            noise_shape=[size if d < masked else 1 for d, size in enumerate(input.shape)],
        )  # fmt: skip


class Dropout1d(_Spatial, nn.Dropout1d):
    """Zeroes whole channels of `[batch, channels, length]` or `[channels, length]` while training.

    Args:
        p: The rate in [0, 1], or one for each channel.
        inplace: Whether to change the input.
    """

    _dims, _ranks, _torch = 1, (2, 3), staticmethod(nn.functional.dropout1d)


class Dropout2d(_Spatial, nn.Dropout2d):
    """Zeroes whole channels of `[batch, channels, height, width]` while training.

    As in torch, three dimensions are taken for batch, channels and length, with a warning.

    Args:
        p: The rate in [0, 1], or one for each channel.
        inplace: Whether to change the input.
    """

    _dims, _ranks, _torch = 2, (4,), staticmethod(nn.functional.dropout2d)


class Dropout3d(_Spatial, nn.Dropout3d):
    """Zeroes whole channels of `[batch, channels, depth, height, width]`, or without batch, while training.

    Args:
        p: The rate in [0, 1], or one for each channel.
        inplace: Whether to change the input.
    """

    _dims, _ranks, _torch = 3, (4, 5), staticmethod(nn.functional.dropout3d)
