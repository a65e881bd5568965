"""Loss scaling under accelerate, for optimizers that unscale in their step.

accelerate hides from `torch.amp.GradScaler` what the step takes.  The scaler then looks for infinities in a
pass of its own that reads and writes every gradient, and accelerate takes every step for done, so that the
learning rate goes on where a step was skipped.
"""

from __future__ import annotations

import functools
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]


class Scaling:
    """Mends both for one optimizer.

    Args:
        optimizer: As `Accelerator.prepare` returns it.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._scaler = getattr(optimizer, "scaler", None)
        self._before = 0.0
        if self._scaler is None:
            return
        if isinstance(optimizer, AcceleratedOptimizer):
            # The scaler asks the signature of `step` whether it may hand itself over.
            functools.update_wrapper(
                optimizer._optimizer_patched_step_method, optimizer._optimizer_original_step_method
            )
        self._before = self._scaler.get_scale()

    def stepped(self) -> None:
        """After a step: it was skipped if the scale is smaller now; under a scaler, waits for the device."""
        if self._scaler is not None:
            scale = self._scaler.get_scale()
            self._optimizer._is_overflow = scale < self._before
            self._before = scale
