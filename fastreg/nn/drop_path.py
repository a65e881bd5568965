"""Stochastic depth (Huang et al. 2016): residual branches are left out sample by sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.dropout import drop_samples
from .dropout import _DropoutBase
from .rates import check_rate


class DropPath(_DropoutBase):
    """Drop-in for timm's `DropPath`: leaves out what a residual branch adds, sample by sample.

    ```python
    x = x + drop_path(branch(x))
    ```

    The branch is computed all the same; `drop_add_residual` spares that too.

    Args:
        drop_prob: The rate in [0, 1]; as `drop_prob` it may be read and set.
        scale_by_keep: Whether what stays is scaled by 1 / (1 - drop_prob).

    Raises:
        ValueError: If the rate is out of range.

    Reference:
        Huang et al. 2016, "Deep networks with stochastic depth".
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    @property
    def drop_prob(self) -> float:
        """The rate."""
        return self.p

    @drop_prob.setter
    def drop_prob(self, value: float) -> None:
        self.p = check_rate(value, "drop_prob")

    def forward(self, input: Tensor) -> Tensor:
        """`[batch, ...]`, and the same."""
        if self.idle:
            return input
        return drop_samples(input, self.drop_thresholds, self.scale_by_keep)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"drop_prob={self.drop_prob}, scale_by_keep={self.scale_by_keep}"


def drop_add_residual(
    x: Tensor, branch: Callable[[Tensor], Tensor], drop_prob: float, training: bool = True
) -> Tensor:
    """Adds branch(x) to x, but computes it only for the samples that stay: what is dropped costs nothing.

    Of `batch` samples max(1, ⌊batch · (1 - drop_prob)⌋), drawn anew each time, are computed, and what the
    branch makes of them is scaled by batch over their number.  Outside of training, and at a rate of 0, all
    are.

    Args:
        x: `[batch, ...]`.
        branch: Makes `[n, ...]` of `[n, ...]`, each sample by itself.
        drop_prob: The rate in [0, 1].
        training: Whether to drop.

    Raises:
        ValueError: If the rate is out of range.

    Reference:
        Huang et al. 2016, "Deep networks with stochastic depth"; Oquab et al. 2023, "DINOv2", for the subset.
    """
    check_rate(drop_prob, "drop_prob")
    if not training or drop_prob == 0 or not len(x):
        return x + branch(x)
    batch = len(x)
    kept = max(1, int(batch * (1 - drop_prob)))
    subset = torch.randperm(batch, device=x.device)[:kept]
    return x.index_add(0, subset, branch(x.index_select(0, subset)).to(x.dtype), alpha=batch / kept)
