"""SGD in one pass over memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .engine import Engine
from .piece import Piece
from .rules import SGD as Rule
from .rules import decay_piece


class SGD(Engine, torch.optim.SGD):
    """Drop-in for `torch.optim.SGD` whose regularizers run in the same pass.

    g ← g + λp,  b ← μb + (1-τ)g,  p ← p - lr·b  (Nesterov: p ← p - lr·(g + μb); μ = 0: p ← p - lr·g)

    Args:
        params: Parameters, named parameters or groups, as for any torch optimizer.
        lr: Learning rate, ≥ 0.
        momentum: Momentum μ, ≥ 0; 0 needs no buffer.
        dampening: Dampening τ of what enters the buffer after the first step.
        weight_decay: Weight decay λ, ≥ 0.
        nesterov: Nesterov momentum; needs momentum > 0 and no dampening.
        maximize: Not supported yet.
        foreach: Taken as in torch, without effect: all tensors are always updated together.
        differentiable: Not supported.
        fused: Taken as in torch, without effect: the step is always fused.
        decay: `"l2"` adds λp to the gradient as torch does, `"decoupled"` subtracts lr·λ·p beside the update.
        regularizers: Pieces such as `ClipNorm`, `GradientNoise`, `EMA`.
        seed: Base of the random numbers, up to 64 bits; from `torch.initial_seed()` by default.

    Raises:
        ValueError: For values out of range, with torch's messages, and for options that are not supported.

    Reference:
        Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, momentum: float = 0, dampening: float = 0,
        weight_decay: float | Tensor = 0, nesterov: bool = False, *,
        maximize: bool = False, foreach: bool | None = None, differentiable: bool = False,
        fused: bool | None = None, decay: str = "l2",
        regularizers: Iterable[Piece] = (), seed: int | None = None,
    ) -> None:  # fmt: skip
        self._compose((Rule(), decay_piece(decay)), regularizers, seed)
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov,
            maximize=maximize, foreach=foreach, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        # torch sets it for `fused=True`: GradScaler would then leave the unscaling to the step.
        self._step_supports_amp_scaling = False
