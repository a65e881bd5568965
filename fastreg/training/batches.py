"""Computes the loss of batches of any kind, and counts their samples and tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..common.batches import get_output
from ..common.unwrap import unwrap_model

Loss = Callable[[Any, Any], Tensor]


def batch_loss(model: nn.Module, batch: Any, loss_fn: Loss | None) -> Tensor:
    """Returns the loss of a batch: a mapping, (inputs, labels), or a tensor; see `Settings.loss_fn`.

    Raises `TypeError` for other batches, and `ValueError` if labels or the model's loss are missing.
    """
    if isinstance(batch, (list, tuple)) and len(batch) == 1:
        batch = batch[0]
    if isinstance(batch, Mapping):
        if loss_fn is None:
            return _model_loss(model(**batch), model, "labels" in batch)
        if "labels" not in batch:
            raise ValueError(f"loss_fn needs labels, the batch has only {', '.join(map(repr, batch))}")
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return loss_fn(_logits(model(**inputs)), batch["labels"])
    if isinstance(batch, Tensor):
        if loss_fn is not None:
            return loss_fn(_logits(model(batch)), batch)
        if not batch.is_floating_point() and hasattr(unwrap_model(model), "config"):  # tokens
            return _model_loss(model(batch, labels=batch), model, True)
        raise ValueError(
            "a batch without labels needs loss_fn(outputs, inputs), as for an autoencoder, or "
            "compute_loss(model, batch)"
        )
    if not isinstance(batch, (list, tuple)) or len(batch) != 2:
        shown = f"{len(batch)} parts" if isinstance(batch, (list, tuple)) else type(batch).__name__
        raise TypeError(
            f"a batch must be a mapping, (inputs, labels) or a tensor, got {shown}; give compute_loss=lambda "
            "model, batch: ..."
        )
    inputs, labels = batch
    outputs = _logits(model(**inputs) if isinstance(inputs, Mapping) else model(inputs))
    return (loss_fn or _cross_entropy)(outputs, labels)


def _cross_entropy(outputs: Any, labels: Any) -> Tensor:
    if isinstance(outputs, Tensor) and isinstance(labels, Tensor):
        single = outputs.dim() == 0 or outputs.shape[min(1, outputs.dim() - 1)] < 2  # the loss would be 0
        if single or (labels.is_floating_point() and labels.shape != outputs.shape):
            raise ValueError(
                f"outputs of shape {tuple(outputs.shape)} with labels of {labels.dtype} and shape "
                f"{tuple(labels.shape)} are no classification: give loss_fn=, such as F.mse_loss or "
                "F.binary_cross_entropy_with_logits"
            )
    return F.cross_entropy(outputs, labels)


def _model_loss(outputs: Any, model: nn.Module, labelled: bool) -> Tensor:
    loss = get_output(outputs, "loss")
    if loss is None:
        fix = "give loss_fn=" if labelled else "the batch has no 'labels'; add them, or give compute_loss="
        raise ValueError(f"the output of {type(unwrap_model(model)).__name__} has no loss: {fix}")
    return loss


def _logits(outputs: Any) -> Any:
    logits = get_output(outputs, "logits")
    return outputs if logits is None else logits


def count_samples(batch: Any) -> int:
    """Returns the number of samples in a batch, the length of its first tensor."""
    return next((len(t) if t.dim() else 1 for t in _tensors(batch)), 1)


def count_tokens(batch: Any) -> int:
    """Returns the number of tokens in a batch, without padding unless the mask is on an accelerator."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor):
        return 0
    mask = batch.get("attention_mask")
    whole = isinstance(mask, Tensor) and mask.shape == ids.shape and mask.device.type == "cpu"
    return int(mask.count_nonzero()) if whole else ids.numel()


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, Sequence)) and not isinstance(batch, str):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(item)
