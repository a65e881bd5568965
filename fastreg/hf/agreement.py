"""R-Drop in a Trainer: its loss is scaled as that of the model, also over accumulated steps.

Models that take `num_items_in_batch` and leave it unused (T5 and BART of transformers 5.23) have the mean
over each micro-batch as their loss, which Trainer adds up instead of averaging; the divergence stays a mean,
with a weight that is the smaller.  `trainer.model_accepts_loss_kwargs = False` mends both.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..losses.r_drop import r_drop


class Agreeing:
    """Called like a model by `Trainer.compute_loss`: each input passes twice, with masks of its own.

    Args:
        model: The model, as prepared.
        alpha: Weight of the divergence.
    """

    def __init__(self, model: nn.Module, alpha: float) -> None:
        self._model, self._alpha = model, alpha

    def __call__(self, num_items_in_batch: Any = None, **inputs: Any) -> dict[str, Any]:
        """The loss and the logits of the first pass."""
        result = r_drop(self._model, inputs, self._alpha, num_items_in_batch=num_items_in_batch)
        return {"loss": result.loss, "logits": result.logits}
