"""Drops each neuron at a rate of its own, which follows from its importance.

Rates change from pass to pass, but a pass that `torch.utils.checkpoint` recomputes must see the rates of
the first time.  Recomputation draws the same seed for the mask.  So the seeds and rates of recent passes are
kept, and a pass with one of these seeds reuses its rates and measures nothing.  This needs operations on
tensors alone: it works in compiled code, and never waits for a GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.validation import check_choice, check_int, check_range
from ..ops._elementwise import draw_seed, transformed
from ..ops.dropout import drop
from ..reference.dropout import DROP_LEVELS
from . import rates
from .dropout import _DropoutBase, rate_property

IMPORTANCES = ("activation", "activation_gradient")
RECENT = 8
"""Passes whose rates are kept for recomputation."""


class AdaptiveDropout(_DropoutBase):
    """Drops less important neurons more often, at the same mean rate.

    Neurons are ranked by a running mean of |x|, or of |x · ∂L/∂y|, to first order the change of the loss if
    a neuron is removed.  With r = -1 for the least important and 1 for the most important one, and equal
    steps in between,

        rate = p - r · min(strength · p, max_rate - p)

    so that the mean is p, to 1/65536.  Equal importances share their mean rank: at first all have the rate p.
    In evaluation nothing is dropped or measured.

    Importances are a float32 buffer, saved with the model; `DistributedDataParallel` broadcasts those of the
    first process.  Values that are not finite are not counted.  A pass with the random numbers of one of the
    last 8 counts as its recomputation; under `torch.func` nothing is measured.  `importance="activation"`
    compiles into one graph; the other breaks it, as it measures in the backward pass.

    Args:
        features: Number of neurons, the size of the dimension.
        p: The mean rate in [0, 1]; may be set at any time.
        importance: `"activation"` or `"activation_gradient"`, which keeps the input until the backward pass.
        momentum: Share of the running mean that each pass keeps; in [0, 1).
        strength: In [0, 1]: 0 is plain dropout.
        dim: The dimension of the neurons.
        max_rate: The highest rate, unless p is higher: a neuron that is always dropped would never learn.

    Raises:
        ValueError: For values out of range.

    Shape:
        Any with `features` in that dimension; the output has the same.

    Reference:
        After Ba & Frey 2013, "Adaptive dropout for training deep neural networks", who learn the rates for
        each input with a network of their own; here they follow from running statistics.  For the importances
        Molchanov et al. 2017, "Pruning convolutional neural networks for resource efficient inference".
    """

    p = rate_property("p")
    importance: Tensor
    seeds: Tensor
    thresholds: Tensor

    def __init__(
        self, features: int, p: float = 0.1, importance: str = "activation", momentum: float = 0.99,
        strength: float = 1.0, dim: int = -1, max_rate: float = 0.9,
    ) -> None:  # fmt: skip
        super().__init__()
        features = check_int("features", features)
        check_choice("importance", importance, IMPORTANCES)
        check_range("momentum", momentum, 0, 1, below=True)
        check_range("strength", strength, 0, 1)
        check_range("max_rate", max_rate, 0, 1)
        self.features, self.kind, self.dim = features, importance, dim
        self.momentum, self.strength, self.max_rate = momentum, strength, max_rate
        self.register_buffer("importance", torch.zeros(features, dtype=torch.float32))
        self.register_buffer("seeds", torch.zeros(RECENT, dtype=torch.int64), persistent=False)
        self.register_buffer("thresholds", torch.zeros(RECENT, features, dtype=torch.int32), persistent=False)
        self.p = p

    @property
    def rates(self) -> Tensor:
        """The rate of each neuron in the next pass: `[features]`."""
        return self._next_thresholds().double() / DROP_LEVELS

    def reset_parameters(self) -> None:
        """Resets the importances to zero."""
        for buffer in (self.importance, self.seeds, self.thresholds):
            buffer.zero_()

    def forward(self, input: Tensor) -> Tensor:
        """Drops elements of the input while training.

        Raises:
            ValueError: If the input does not have `features` neurons.
        """
        if not self.training:
            return input
        if input.shape[self.dim] != self.features:
            raise ValueError(
                f"expected {self.features} features in dimension {self.dim}, got shape {tuple(input.shape)}"
            )
        seed, thresholds = draw_seed(input.device), self._next_thresholds()
        measuring = torch.compiler.is_compiling() or not transformed()
        if measuring:
            repeated = self.seeds == seed
            recomputed = repeated.any()
            thresholds = torch.where(
                recomputed, (self.thresholds * repeated[:, None]).sum(0, dtype=torch.int32), thresholds
            )
        output = drop(input, thresholds, dim=self.dim, seed=seed)
        if measuring:
            self._remember(recomputed, seed, thresholds)
            if self.kind == "activation":
                self._measure(input.detach(), recomputed)
            else:
                output = _watch(output, input.detach(), self._measure)
        return output

    def _next_thresholds(self) -> Tensor:
        """Returns thresholds by rank: int32, `[features]`."""
        ordered = self.importance.sort().values
        below = torch.searchsorted(ordered, self.importance)
        above = self.features - torch.searchsorted(ordered, self.importance, right=True)
        target = self.drop_thresholds.double()
        most = rates.drop_threshold(self.max_rate)
        reach = torch.minimum(self.strength * target, most - target).clamp(min=0)
        # Halves round to even, so that deviations above and below the target are equal.
        return (target + reach * ((above - below).double() / max(self.features - 1, 1))).round().int()

    @torch.no_grad()
    def _remember(self, recomputed: Tensor, seed: Tensor, thresholds: Tensor) -> None:
        """Keeps seed and thresholds in place of the oldest, unless the pass is a recomputation."""
        for buffer, latest in ((self.seeds, seed), (self.thresholds, thresholds)):
            buffer.copy_(torch.where(recomputed, buffer, torch.cat((latest[None], buffer[:-1]))))

    @torch.no_grad()
    def _measure(self, values: Tensor, recomputed: Tensor | None = None) -> None:
        """Updates the running mean by |values|, unless the pass is a recomputation."""
        others = [d for d in range(-values.dim(), 0) if (d - self.dim) % values.dim()]
        wide = torch.promote_types(values.dtype, torch.float32)
        total = torch.linalg.vector_norm(values[None], 1, [-values.dim() - 1, *others], dtype=wide)
        mean = (
            total * (self.features / values.numel()) if values.numel() else torch.full_like(total, torch.nan)
        )
        counts = mean.isfinite() if recomputed is None else mean.isfinite() & ~recomputed
        mean = self.importance.lerp(mean.to(self.importance.dtype), 1 - self.momentum)
        self.importance.copy_(torch.where(counts, mean, self.importance))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self.importance
        super()._apply(fn, recurse)
        if before.is_meta and not self.importance.is_meta:  # its content is arbitrary
            self.reset_parameters()
        elif self.importance.dtype != before.dtype:  # a running mean of bfloat16 would stand still
            self.importance = before.to(self.importance.device)
        return self

    def extra_repr(self) -> str:
        """Returns the arguments for `repr`."""
        return f"features={self.features}, p={self.p}, importance={self.kind!r}, strength={self.strength}"


@torch._disable_dynamo  # `torch.compiler.disable` would import Dynamo, and triton with it
def _watch(output: Tensor, input: Tensor, measure: Callable[[Tensor], None]) -> Tensor:
    return _Watch.apply(output, input, measure) if output.requires_grad else output


class _Watch(torch.autograd.Function):
    """The identity, whose backward pass measures |input · gradient|."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, input: Tensor, measure: Callable[[Tensor], None]) -> Tensor:
        ctx.save_for_backward(input)
        ctx.measure = measure
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (input,) = ctx.saved_tensors
        wide = torch.promote_types(input.dtype, torch.float32)
        ctx.measure(input.to(wide) * gradient.detach())
        return gradient, None, None
