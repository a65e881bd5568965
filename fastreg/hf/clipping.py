"""`max_grad_norm`, for an optimizer that clips and measures in its step.

Trainer clips in two passes over all gradients before the step, one that reads and one that reads and writes
(with `max_grad_norm=0` likewise, by a factor of 1).  Here the step does it, and the norm that it measures is
logged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.utils import logging

from ..optim import ClipNorm
from ..optim.fused_optimizer import FusedOptimizer
from ..reference.step import scalar_dtype

logger = logging.get_logger(__name__)
DEFAULT: float = TrainingArguments.__dataclass_fields__["max_grad_norm"].default


class Clipping:
    """Lets the step clip, once, and hands out the norm that it measures."""

    def __init__(self) -> None:
        self._own: ClipNorm | None = None
        self._norm: Tensor | None = None

    def fit(self, engine: FusedOptimizer, max_grad_norm: float) -> None:
        """Let the optimizer clip by what it was given, or else by `max_grad_norm`; by 0 it only measures.

        Args:
            engine: The optimizer.
            max_grad_norm: Of the `TrainingArguments`.

        Raises:
            ValueError: If both say how to clip, and not the same.
        """
        clip = next((component for component in engine.components if isinstance(component, ClipNorm)), None)
        if clip is None:
            self._own = ClipNorm(max_grad_norm or math.inf)
            engine.add_component(self._own)
        elif clip is self._own:
            clip.max_norm = float(max_grad_norm or math.inf)
        elif max_grad_norm == DEFAULT != clip.max_norm:
            logger.warning(
                f"The optimizer's {clip!r} clips; max_grad_norm={DEFAULT} of TrainingArguments, its default, "
                "does not. Set max_grad_norm=0 to say so."
            )
        elif max_grad_norm not in (0, clip.max_norm):
            raise ValueError(
                f"max_grad_norm={max_grad_norm} of TrainingArguments and {clip!r} of the optimizer "
                "contradict each other: set max_grad_norm=0, or leave ClipNorm out"
            )

    def announced(self, engine: FusedOptimizer) -> Tensor:
        """The norm of the step that comes next: 0-d, on the device, where `measured` writes it."""
        if self._norm is None:
            device = next(p.device for group in engine.param_groups for p in group["params"])
            self._norm = torch.zeros((), dtype=scalar_dtype(device), device=device)
        return self._norm

    def measured(self, engine: FusedOptimizer) -> None:
        """Take over the norm of the latest step; nobody waits for it."""
        if self._norm is not None and (norm := engine.grad_norm) is not None:
            self._norm.copy_(norm)
