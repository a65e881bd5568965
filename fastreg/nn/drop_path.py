"""Drops residual branches sample by sample: stochastic depth (Huang et al. 2016)."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..common.validation import check_flag, check_rate
from ..ops.dropout import drop_samples
from .dropout import _DropoutBase, rate_property


class DropPath(_DropoutBase):
    """Drop-in for timm's `DropPath`: drops the output of a residual branch, sample by sample.

    ```python
    x = x + drop_path(branch(x))
    ```

    The branch is computed for all samples; `drop_add_residual` computes it for those that are kept.

    Args:
        drop_prob: The rate in [0, 1]; as `drop_prob` it may be read and set.
        scale_by_keep: Whether kept samples are scaled by 1 / (1 - drop_prob).

    Raises:
        ValueError: If the rate is out of range.

    Reference:
        Huang et al. 2016, "Deep networks with stochastic depth".
    """

    drop_prob = rate_property("drop_prob")

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = check_flag("scale_by_keep", scale_by_keep)

    def forward(self, input: Tensor) -> Tensor:
        """Drops samples of the input `[batch, ...]` while training."""
        if self.idle:
            return input
        return drop_samples(input, self.drop_thresholds, self.scale_by_keep)

    def extra_repr(self) -> str:
        """Returns the arguments for `repr`."""
        return f"drop_prob={self.drop_prob}, scale_by_keep={self.scale_by_keep}"


def drop_add_residual(
    x: Tensor, branch: Callable[[Tensor], Tensor], drop_prob: float, training: bool = True
) -> Tensor:
    """Adds branch(x) to x, but computes the branch only for the samples that are kept.

    Of `batch` samples max(1, ⌊batch · (1 - drop_prob)⌋), drawn anew each time, are kept, and the output of
    the branch is scaled by batch over their number.  In evaluation, and at a rate of 0, all are.

    Args:
        x: `[batch, ...]`.
        branch: A function of `[n, ...]` that returns this shape and computes each sample by itself.
        drop_prob: The rate in [0, 1].
        training: Whether to drop.

    Raises:
        ValueError: If the rate is out of range.

    Reference:
        Huang et al. 2016, "Deep networks with stochastic depth"; Oquab et al. 2023, "DINOv2", for the subset.
    """
    check_rate("drop_prob", drop_prob)
    if not training or drop_prob == 0 or not len(x):
        return x + branch(x)
    batch = len(x)
    kept = max(1, int(batch * (1 - drop_prob)))
    subset = torch.randperm(batch, device=x.device)[:kept]
    return x.index_add(0, subset, branch(x.index_select(0, subset)).to(x.dtype), alpha=batch / kept)
