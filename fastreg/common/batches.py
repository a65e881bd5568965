"""Handles batches and outputs of models, whatever mappings, sequences or classes they are."""

from collections.abc import Mapping
from typing import Any


def move_to_device(batch: Any, device: Any) -> Any:
    """Returns a batch with all its tensors on a device; `None` leaves them where they are."""
    if device is None:
        return batch
    if isinstance(batch, Mapping):
        return {key: move_to_device(item, device) for key, item in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move_to_device(item, device) for item in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(move_to_device(item, device) for item in batch)
    return batch.to(device) if hasattr(batch, "to") else batch


def get_output(outputs: Any, name: str) -> Any:
    """Returns what a model has returned by a name, such as "logits"; `None` if there is nothing."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
