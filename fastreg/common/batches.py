"""Handles batches and outputs of models, whatever mappings, sequences or classes they are."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def move_to_device(batch: Any, device: Any) -> Any:
    """Returns a batch with all its tensors on a device; `None` leaves them where they are."""
    if device is None:
        return batch
    return map_items(batch, lambda item: item.to(device) if hasattr(item, "to") else item)


def map_items(batch: Any, function: Callable[[Any], Any]) -> Any:
    """Returns a batch with a function applied to each item of its mappings and sequences, at any depth."""
    if isinstance(batch, Mapping):
        return {key: map_items(item, function) for key, item in batch.items()}
    if isinstance(batch, (list, tuple)):
        return _like(batch, [map_items(item, function) for item in batch])
    return function(batch)


def map_first_tensor(module: nn.Module, output: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Returns the output of a module with a function applied to it, or to the tensor it starts with.

    Raises:
        TypeError: If the output is neither a tensor nor a tuple or list that starts with one.
    """
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, (list, tuple)) and output and isinstance(output[0], Tensor):
        return _like(output, [function(output[0]), *output[1:]])
    raise TypeError(
        f"the output of {type(module).__name__} must be a tensor, or a tuple or list that starts with one, "
        f"got {type(output).__name__}; choose a module within"
    )


def _like(sequence: Any, items: list[Any]) -> Any:
    """Returns items as the same kind of list, tuple or named tuple."""
    return getattr(type(sequence), "_make", type(sequence))(items)


def get_output(outputs: Any, name: str) -> Any:
    """Returns what a model has returned by a name, such as "logits"; `None` if there is nothing."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
