"""Lion in one pass over memory."""

import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..common.validation import check_range
from ..engine.component import Component
from .fused_optimizer import FusedOptimizer
from .rules import Lion as Rule


class Lion(FusedOptimizer):
    """Lion: the sign of an interpolated momentum, with decoupled weight decay.

    p ← p - lr·λ·p - lr · sign(β₁m + (1-β₁)g),  m ← β₂m + (1-β₂)g

    Args:
        params: Parameters, named parameters or groups, as for any torch optimizer.
        lr: Learning rate, ≥ 0; 3 to 10 times smaller than for AdamW.
        betas: Interpolation for the update and decay of the momentum, each in [0, 1).
        weight_decay: Decoupled weight decay λ, ≥ 0; 3 to 10 times larger than for AdamW.
        maximize: Ascend instead of descend.
        foreach: Taken as by torch's optimizers, without effect: all tensors are always updated together.
        capturable: For CUDA graphs.
        differentiable: Not supported.
        fused: The step is always fused; `True` leaves unscaling to it under a `torch.amp.GradScaler`.
        decay: As for `Adam`, like all that follow; `"decoupled"` by default.
        regularizers: Components such as `ClipNorm`, `GradientNoise`, `EMA`.
        bf16: How 16-bit weights are rounded.
        state_dtype: Of the momentum.
        nonfinite: What to do if a gradient is NaN or infinite.
        seed: Base of the random numbers.

    Raises:
        ValueError: For values out of range.

    Reference:
        Chen et al. 2023, "Symbolic discovery of optimization algorithms".
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0, *, maximize: bool = False, foreach: bool | None = None,
        capturable: bool = False, differentiable: bool = False, fused: bool | None = None,
        decay: str | None = None, regularizers: Iterable[Component] = (), bf16: str = "stochastic",
        state_dtype: torch.dtype | None = None, nonfinite: str = "propagate", seed: int | None = None,
    ) -> None:  # fmt: skip
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got {lr=}")
        if not isinstance(lr, Tensor):
            check_range("lr", lr, 0, finite=False)
        numeric = all(isinstance(beta, (numbers.Real, Tensor)) for beta in betas)
        if len(betas) != 2 or not numeric or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas=}")
        check_range("weight_decay", weight_decay, 0)
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        self._init_components(Rule(), decay or "decoupled", regularizers, seed, bf16, state_dtype, nonfinite)
        defaults = {
            "lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize, "foreach": foreach,
            "capturable": capturable, "differentiable": differentiable, "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults)
