"""Adam and AdamW in one pass over memory."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..common import validation
from ..engine.component import Component
from .fused_optimizer import FusedOptimizer
from .rules import Adam as Rule


class Adam(FusedOptimizer, torch.optim.Adam):
    """Drop-in for `torch.optim.Adam` whose regularizers run in the same pass.

    g ← g + λp,  m ← β₁m + (1-β₁)g,  v ← β₂v + (1-β₂)g²,  p ← p - lr · m̂/(√v̂ + ε)

    Args:
        params: Parameters, named parameters or groups, as for any torch optimizer.
        lr: Learning rate, ≥ 0.
        betas: Decay of the running averages of the gradient and of its square, each in [0, 1).
        eps: Added to the denominator, ≥ 0.
        weight_decay: Weight decay λ, ≥ 0.
        amsgrad: Divide by the largest v so far (Reddi et al. 2018).
        foreach: Taken as in torch, without effect: all tensors are always updated together.
        maximize: Ascend instead of descend.
        capturable: Keep the step count on the device, with everything computed from it: for CUDA graphs.
        differentiable: Not supported.
        fused: The step is always fused; `True` leaves unscaling to it under a `torch.amp.GradScaler`.
        decoupled_weight_decay: As AdamW.
        decay: `"l2"`, `"decoupled"`, `"independent"` (of the learning rate: p ← p - lr/lr_max · λ · p) or
            `"cautious"` (only where the update shrinks p as well); groups may have a `decay` of their own.
        regularizers: Components such as `ClipNorm`, `GradientNoise`, `EMA`.
        bf16: How 16-bit weights are rounded: `"stochastic"`, `"remainder"` (bfloat16 with 16 more bits in the
            state, an exact float32) or `"nearest"` as torch, which loses small updates.
        state_dtype: Of the running averages; by default that of the parameter, float32 with `"remainder"`.
        nonfinite: What to do if a gradient is NaN or infinite: `"propagate"` as torch, `"skip"` the step, or
            skip it and `"raise"` at the next one; decided on the device, without a synchronization.
        seed: Base of the random numbers, up to 64 bits; from `torch.initial_seed()` by default.

    Raises:
        ValueError: For values out of range, with torch's messages, and for options that are not supported.

    Reference:
        Kingma & Ba 2015, "Adam: a method for stochastic optimization".
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0, amsgrad: bool = False, *,
        foreach: bool | None = None, maximize: bool = False, capturable: bool = False,
        differentiable: bool = False, fused: bool | None = None, decoupled_weight_decay: bool = False,
        decay: str | None = None, regularizers: Iterable[Component] = (), bf16: str = "stochastic",
        state_dtype: torch.dtype | None = None, nonfinite: str = "propagate", seed: int | None = None,
    ) -> None:  # fmt: skip
        self._init_components(Rule(), decay, regularizers, seed, bf16, state_dtype, nonfinite)
        with validation.complete_torch_errors(lr=lr, betas=betas):
            torch.optim.Adam.__init__(
                self, params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize,
                capturable=capturable, differentiable=differentiable, fused=fused,
                decoupled_weight_decay=decoupled_weight_decay,
            )  # fmt: skip


class AdamW(Adam, torch.optim.AdamW):
    """Drop-in for `torch.optim.AdamW` whose regularizers run in the same pass.

    m ← β₁m + (1-β₁)g,  v ← β₂v + (1-β₂)g²,  p ← p - lr·λ·p - lr · m̂/(√v̂ + ε)

    Args:
        params: Parameters, named parameters or groups, as for any torch optimizer.
        lr: Learning rate, ≥ 0.
        betas: Decay of the running averages of the gradient and of its square, each in [0, 1).
        eps: Added to the denominator, ≥ 0.
        weight_decay: Decoupled weight decay λ, ≥ 0.
        amsgrad: Divide by the largest v so far.
        maximize: Ascend instead of descend.
        foreach: Taken as in torch, without effect: all tensors are always updated together.
        capturable: For CUDA graphs.
        differentiable: Not supported.
        fused: The step is always fused; `True` leaves unscaling to it under a `torch.amp.GradScaler`.
        decay: As for `Adam`, like all that follow; `"decoupled"` by default.
        regularizers: Components such as `ClipNorm`, `GradientNoise`, `EMA`.
        bf16: How 16-bit weights are rounded.
        state_dtype: Of the running averages.
        nonfinite: What to do if a gradient is NaN or infinite.
        seed: Base of the random numbers.

    Raises:
        ValueError: For values out of range, with torch's messages, and for options that are not supported.

    Reference:
        Loshchilov & Hutter 2019, "Decoupled weight decay regularization".
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, amsgrad: bool = False, *,
        maximize: bool = False, foreach: bool | None = None, capturable: bool = False,
        differentiable: bool = False, fused: bool | None = None,
        decay: str | None = None, regularizers: Iterable[Component] = (), bf16: str = "stochastic",
        state_dtype: torch.dtype | None = None, nonfinite: str = "propagate", seed: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize,
            capturable=capturable, differentiable=differentiable, fused=fused, decoupled_weight_decay=True,
            decay=decay, regularizers=regularizers, bf16=bf16, state_dtype=state_dtype, nonfinite=nonfinite,
            seed=seed,
        )  # fmt: skip
