"""SGD in one pass over memory."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..common import validation
from ..engine.component import Component
from .fused_optimizer import FusedOptimizer
from .rules import SGD as Rule


class SGD(FusedOptimizer, torch.optim.SGD):
    """Drop-in for `torch.optim.SGD` whose regularizers run in the same pass.

    g ← g + λp,  b ← μb + (1-τ)g,  p ← p - lr·b  (Nesterov: p ← p - lr·(g + μb); μ = 0: p ← p - lr·g)

    Args:
        params: Parameters, named parameters or groups, as for any torch optimizer.
        lr: Learning rate, ≥ 0.
        momentum: Momentum μ, ≥ 0; 0 needs no buffer.
        dampening: Dampening τ of what enters the buffer after the first step.
        weight_decay: Weight decay λ, ≥ 0.
        nesterov: Nesterov momentum; needs momentum > 0 and no dampening.
        maximize: Ascend instead of descend.
        foreach: Taken as in torch, without effect: all tensors are always updated together.
        differentiable: Not supported.
        fused: The step is always fused; `True` leaves unscaling to it under a `torch.amp.GradScaler`.
        decay: As for `Adam`, like all that follow; `"l2"` by default.
        regularizers: Components such as `ClipNorm`, `GradientNoise`, `EMA`.
        bf16: How 16-bit weights are rounded.
        state_dtype: Of the momentum buffer.
        nonfinite: What to do if a gradient is NaN or infinite.
        seed: Base of the random numbers.

    Raises:
        ValueError: For values out of range, with torch's messages, and for options that are not supported.

    Reference:
        Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, momentum: float = 0, dampening: float = 0,
        weight_decay: float | Tensor = 0, nesterov: bool = False, *,
        maximize: bool = False, foreach: bool | None = None, differentiable: bool = False,
        fused: bool | None = None, decay: str | None = None, regularizers: Iterable[Component] = (),
        bf16: str = "stochastic", state_dtype: torch.dtype | None = None, nonfinite: str = "propagate",
        seed: int | None = None,
    ) -> None:  # fmt: skip
        self._init_components(Rule(), decay or "l2", regularizers, seed, bf16, state_dtype, nonfinite)
        with validation.complete_torch_errors(lr=lr, momentum=momentum, dampening=dampening):
            super().__init__(
                params, lr, momentum, dampening, weight_decay, nesterov,
                maximize=maximize, foreach=foreach, differentiable=differentiable, fused=fused,
            )  # fmt: skip
