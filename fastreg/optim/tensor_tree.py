"""Tensors under the names that they have in a model, and all names of those."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class TensorTree(nn.Module):
    """A module that keeps buffers under names with dots; casts leave their dtypes alone."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TensorTree:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def put(self, name: str, tensor: Tensor, persistent: bool | None = None) -> None:
        """Registers a buffer; by default it is saved if the one that it replaces is."""
        *path, last = name.split(".")
        node: nn.Module = self
        for part in path:
            if part not in node._modules:
                node.add_module(part, TensorTree())
            node = node.get_submodule(part)
        if persistent is None:
            node._buffers[last] = tensor
        else:
            node.register_buffer(last, tensor, persistent)


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Returns all parameters and buffers by all their names: one that is shared comes several times."""
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def first_names(module: nn.Module) -> dict[int, str]:
    """Returns the first name of each parameter and buffer, by its id."""
    return {id(tensor): name for name, tensor in reversed(named_tensors(module))}


def unsaved_buffers(module: nn.Module) -> set[str]:
    """Returns the names of the buffers that are not saved."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, owner in module.named_modules()
        for name in owner._non_persistent_buffers_set
    }
