"""Dropout with a rate for each neuron, by its importance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.dropout import LEVELS
from . import functional
from .dropout import Rated
from .rates import Rate

IMPORTANCES = ("activation", "activation_gradient")


class AdaptiveDropout(Rated):
    """Drops less important neurons more often, at the same mean rate.

    Neurons are ranked by a running mean of |x|, or of |x · ∂L/∂y|, the first-order effect of leaving a neuron
    out.  The rate falls in equal steps from p · (1 + strength) for the least important one to
    p · (1 - strength) for the most important one, so that the mean is p exactly, to 1/65536.  Until something
    is known, all have p.  Outside of training nothing is dropped or measured.

    Rates are renewed at the first forward pass after a backward pass, and passes that recompute what was not
    kept, as in `torch.utils.checkpoint`, neither measure nor renew: their masks are those of the first pass.
    Importances are buffers, saved with the model; `DistributedDataParallel` spreads those of one process.
    `importance="activation"` compiles into one graph; the other needs a hook and runs eagerly.

    Args:
        features: Neurons, the size of the dimension.
        p: The mean rate in [0, 1]; may be set at any time.
        importance: `"activation"` or `"activation_gradient"`, which keeps the input until the backward pass.
        momentum: Share of the former running mean that each pass keeps; in [0, 1).
        strength: In [0, 1]: 0 is plain dropout.  Less is used where p · (1 + strength) would exceed 1.
        dim: Where the neurons are.

    Raises:
        ValueError: For values out of range.

    Shape:
        Any with `features` in that dimension, and the same.

    Reference:
        After Ba & Frey 2013, "Adaptive dropout for training deep neural networks", who learn rates for each
        input with a network of their own; here they follow from running statistics.
    """

    importance: Tensor
    passes: Tensor
    levels: Tensor

    def __init__(
        self, features: int, p: float = 0.1, importance: str = "activation", momentum: float = 0.99,
        strength: float = 1.0, dim: int = -1,
    ) -> None:  # fmt: skip
        super().__init__()
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}")
        if importance not in IMPORTANCES:
            raise ValueError(
                f"importance must be one of {', '.join(map(repr, IMPORTANCES))}, got {importance!r}"
            )
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be in [0, 1], got {strength}")
        self.features, self.kind, self.dim = features, importance, dim
        self.momentum, self.strength = momentum, strength
        self.register_buffer("importance", torch.zeros(features))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("levels", torch.zeros(features, dtype=torch.int32), persistent=False)
        self.p = p

    @property
    def p(self) -> Any:
        """The mean rate."""
        return self._p

    @p.setter
    def p(self, value: Rate) -> None:
        if not isinstance(value, (int, float)):
            raise ValueError(
                f"p must be one rate, got {value!r}; fastreg.nn.Dropout takes one for each channel"
            )
        Rated.p.fset(self, value)  # type: ignore[attr-defined]
        self._stale = True

    @property
    def rates(self) -> Tensor:
        """What each neuron is dropped at from the next renewal on: `[features]`."""
        return self._levels().double() / LEVELS

    def _levels(self) -> Tensor:
        rank = self.importance.argsort(stable=True).argsort().double()
        tilt = 1 - 2 * rank / max(self.features - 1, 1) if self.features > 1 else 0 * rank
        target = self.thresholds.double()
        # No rate exceeds 1; halves round to even, so that what is above and below the target is equal.
        reach = torch.minimum(self.strength * target, LEVELS - target)
        tilt = torch.where(self.passes > 0, tilt, 0)
        return (target + reach * tilt).round().to(torch.int32)

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
        if torch.compiler.is_compiling():
            levels = self._levels()
            self._measure(input.detach())
            return functional.by_thresholds(input, levels, dim=self.dim)
        if torch._C._current_graph_task_id() == -1:  # else it recomputes
            if self._stale:
                self.levels, self._stale = self._levels(), False
            if self.kind == "activation":
                self._measure(input.detach())
        output = functional.by_thresholds(input, self.levels, dim=self.dim)
        if output.requires_grad:
            activation = input.detach() if self.kind == "activation_gradient" else None
            output.register_hook(lambda gradient: self._passed(activation, gradient))
        return output

    @torch.no_grad()
    def _passed(self, activation: Tensor | None, gradient: Tensor) -> None:
        """Behind a backward pass."""
        self._stale = True
        if activation is not None:
            self._measure(activation * gradient)

    @torch.no_grad()
    def _measure(self, what: Tensor) -> None:
        dims = [d for d in range(what.dim()) if d != self.dim % what.dim()]
        mean = what.abs().mean(dims, dtype=self.importance.dtype) if dims else what.abs().to(self.importance)
        self.importance.lerp_(mean, 1 - self.momentum)
        self.passes.add_(1)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._stale = True
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._stale = True

    def extra_repr(self) -> str:
        """The arguments."""
        return f"features={self.features}, p={self.p}, importance={self.kind!r}, strength={self.strength}"
