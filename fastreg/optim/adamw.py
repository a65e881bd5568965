"""AdamW in one pass over memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .engine import Engine
from .piece import Piece
from .rules import Adam, DecoupledDecay


class AdamW(Engine, torch.optim.AdamW):
    """Drop-in for `torch.optim.AdamW` whose regularizers run in the same pass.

    m ← β₁m + (1-β₁)g,  v ← β₂v + (1-β₂)g²,  p ← p - lr·λ·p - lr · m̂/(√v̂ + ε)

    Args:
        params: Parameters, named parameters or groups, as for any torch optimizer.
        lr: Learning rate, ≥ 0.
        betas: Decay of the running averages of the gradient and of its square, each in [0, 1).
        eps: Added to the denominator, ≥ 0.
        weight_decay: Decoupled weight decay λ, ≥ 0.
        amsgrad: Not supported yet.
        maximize: Not supported yet.
        foreach: Taken as in torch, without effect: all tensors are always updated together.
        capturable: Not supported yet.
        differentiable: Not supported.
        fused: Taken as in torch, without effect: the step is always fused.
        regularizers: Pieces such as `ClipNorm`, `GradientNoise`, `EMA`.
        seed: Base of the random numbers, up to 64 bits; from `torch.initial_seed()` by default.

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
        regularizers: Iterable[Piece] = (), seed: int | None = None,
    ) -> None:  # fmt: skip
        self._compose((Adam(), DecoupledDecay()), regularizers, seed)
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad,
            maximize=maximize, foreach=foreach, capturable=capturable,
            differentiable=differentiable, fused=fused,
        )  # fmt: skip
        # torch sets it for `fused=True`: GradScaler would then leave the unscaling to the step.
        self._step_supports_amp_scaling = False
