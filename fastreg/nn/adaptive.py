"""Dropout with a rate for each neuron, by its importance.

Rates change from pass to pass, but what `torch.utils.checkpoint` computes a second time must see those of the
first.  A pass is known by the seed of its mask, which recomputation draws again: seeds and rates of the last
passes are kept, and a pass with one of these seeds takes the rates that belong to it and measures nothing.
This takes operations on tensors alone, so it holds in compiled code and never waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.validation import check_choice, check_int, check_range
from ..ops._elementwise import draw_seed, transformed
from ..ops.dropout import drop
from ..reference.dropout import DROP_LEVELS
from . import rates
from .dropout import _DropoutBase
from .rates import Rate

IMPORTANCES = ("activation", "activation_gradient")
RECENT = 8
"""Passes that recomputation may lie behind."""


class AdaptiveDropout(_DropoutBase):
    """Drops less important neurons more often, at the same mean rate.

    Neurons are ranked by a running mean of |x|, or of |x · ∂L/∂y|, to first order what leaving a neuron out
    does to the loss.  With r = -1 for the least important and 1 for the most important one, and equal steps
    in between,

        rate = p - r · min(strength · p, max_rate - p)

    so that the mean is p, to 1/65536.  Equal importances share their mean rank: as long as nothing is known,
    all have the rate p.  Outside of training nothing is dropped or measured.

    Importances are a float32 buffer, saved with the model; `DistributedDataParallel` spreads those of the
    first process.  What is not finite is not counted.  A pass with the same random numbers as one of the last
    8 is taken for its recomputation; within `torch.func` nothing is measured.  `importance="activation"`
    compiles into one graph; the other breaks it, as it measures in the backward pass.

    Args:
        features: Neurons, the size of the dimension.
        p: The mean rate in [0, 1]; may be set at any time.
        importance: `"activation"` or `"activation_gradient"`, which keeps the input until the backward pass.
        momentum: Share of the former running mean that each pass keeps; in [0, 1).
        strength: In [0, 1]: 0 is plain dropout.
        dim: Where the neurons are.
        max_rate: What no rate but p itself may exceed: a neuron that is always dropped would never learn.

    Raises:
        ValueError: For values out of range.

    Shape:
        Any with `features` in that dimension, and the same.

    Reference:
        After Ba & Frey 2013, "Adaptive dropout for training deep neural networks", who learn the rates for
        each input with a network of their own; here they follow from running statistics.  For the importances
        Molchanov et al. 2017, "Pruning convolutional neural networks for resource efficient inference".
    """

    importance: Tensor
    seeds: Tensor
    levels: Tensor

    def __init__(
        self, features: int, p: float = 0.1, importance: str = "activation", momentum: float = 0.99,
        strength: float = 1.0, dim: int = -1, max_rate: float = 0.9,
    ) -> None:  # fmt: skip
        super().__init__()
        check_int("features", features)
        check_choice("importance", importance, IMPORTANCES)
        check_range("momentum", momentum, 0, 1, below=True)
        check_range("strength", strength, 0, 1)
        check_range("max_rate", max_rate, 0, 1)
        self.features, self.kind, self.dim = features, importance, dim
        self.momentum, self.strength, self.max_rate = momentum, strength, max_rate
        self.register_buffer("importance", torch.zeros(features, dtype=torch.float32))
        self.register_buffer("seeds", torch.zeros(RECENT, dtype=torch.int64), persistent=False)
        self.register_buffer("levels", torch.zeros(RECENT, features, dtype=torch.int32), persistent=False)
        self.p = p

    @property
    def p(self) -> Any:
        """The mean rate."""
        return self._p

    @p.setter
    def p(self, value: Rate) -> None:
        _DropoutBase.p.fset(self, rates.check_rate(value))  # type: ignore[attr-defined]

    @property
    def rates(self) -> Tensor:
        """What each neuron is dropped at in the next pass: `[features]`."""
        return self._next_levels().double() / DROP_LEVELS

    def reset_parameters(self) -> None:
        """Forget all that was measured."""
        for buffer in (self.importance, self.seeds, self.levels):
            buffer.zero_()

    def forward(self, input: Tensor) -> Tensor:
        """The input with its elements dropped; as it is when not training.

        Raises:
            ValueError: If there are not as many neurons as `features`.
        """
        if not self.training:
            return input
        if input.shape[self.dim] != self.features:
            raise ValueError(
                f"expected {self.features} features in dimension {self.dim}, got shape {tuple(input.shape)}"
            )
        seed, levels = draw_seed(input.device), self._next_levels()
        watched = torch.compiler.is_compiling() or not transformed()
        if watched:
            repeated = self.seeds == seed
            again = repeated.any()
            levels = torch.where(again, (self.levels * repeated[:, None]).sum(0, dtype=torch.int32), levels)
        output = drop(input, levels, dim=self.dim, seed=seed)
        if watched:
            self._remember(again, seed, levels)
            if self.kind == "activation":
                self._measure(input.detach(), again)
            else:
                output = _watch(output, input.detach(), self._measure)
        return output

    def _next_levels(self) -> Tensor:
        """Thresholds by rank: int32, `[features]`."""
        ordered = self.importance.sort().values
        below = torch.searchsorted(ordered, self.importance)
        above = self.features - torch.searchsorted(ordered, self.importance, right=True)
        target = self.drop_thresholds.double()
        most = rates.drop_threshold(self.max_rate)
        reach = torch.minimum(self.strength * target, most - target).clamp(min=0)
        # Halves round to even, so that what is above and below the target is equal.
        return (target + reach * ((above - below).double() / max(self.features - 1, 1))).round().int()

    @torch.no_grad()
    def _remember(self, again: Tensor, seed: Tensor, levels: Tensor) -> None:
        """Keep seed and levels in place of the oldest, but for a pass that is there."""
        seeds = torch.cat((seed[None], self.seeds[:-1]))
        self.seeds.copy_(torch.where(again, self.seeds, seeds))
        self.levels.copy_(torch.where(again, self.levels, torch.cat((levels[None], self.levels[:-1]))))

    @torch.no_grad()
    def _measure(self, what: Tensor, again: Tensor | None = None) -> None:
        """A step of the running mean of |what|, unless this was done before."""
        others = [d for d in range(-what.dim(), 0) if (d - self.dim) % what.dim()]
        wide = torch.promote_types(what.dtype, torch.float32)
        total = torch.linalg.vector_norm(what[None], 1, [-what.dim() - 1, *others], dtype=wide)
        mean = total * (self.features / what.numel()) if what.numel() else torch.full_like(total, torch.nan)
        counts = mean.isfinite() if again is None else mean.isfinite() & ~again
        mean = self.importance.lerp(mean.to(self.importance.dtype), 1 - self.momentum)
        self.importance.copy_(torch.where(counts, mean, self.importance))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self.importance
        super()._apply(fn, recurse)
        if before.is_meta and not self.importance.is_meta:  # it would hold anything
            self.reset_parameters()
        elif self.importance.dtype != before.dtype:  # a running mean of bfloat16 would stand still
            self.importance = before.to(self.importance.device)
        return self

    def extra_repr(self) -> str:
        """The arguments."""
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
