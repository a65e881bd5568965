"""Lion in one pass over memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .engine import Engine
from .piece import Piece
from .rules import DecoupledDecay
from .rules import Lion as Rule


class Lion(Engine):
    """Lion: the sign of an interpolated momentum, with decoupled weight decay.

    p ← p - lr·λ·p - lr · sign(β₁m + (1-β₁)g),  m ← β₂m + (1-β₂)g

    Args:
        params: Parameters, named parameters or groups, as for any torch optimizer.
        lr: Learning rate, ≥ 0; 3 to 10 times smaller than for AdamW.
        betas: Interpolation for the update and decay of the momentum, each in [0, 1).
        weight_decay: Decoupled weight decay λ, ≥ 0; 3 to 10 times larger than for AdamW.
        regularizers: Pieces such as `ClipNorm`, `GradientNoise`, `EMA`.
        seed: Base of the random numbers, up to 64 bits; from `torch.initial_seed()` by default.

    Raises:
        ValueError: For values out of range.

    Reference:
        Chen et al. 2023, "Symbolic discovery of optimization algorithms".
    """

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0, *, regularizers: Iterable[Piece] = (), seed: int | None = None,
    ) -> None:  # fmt: skip
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not 0 <= lr:
            raise ValueError(f"lr must be >= 0, got {lr=}")
        if not all(0 <= beta < 1 for beta in betas) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas=}")
        if not 0 <= weight_decay:
            raise ValueError(f"weight_decay must be >= 0, got {weight_decay=}")
        self._compose((Rule(), DecoupledDecay()), regularizers, seed)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
