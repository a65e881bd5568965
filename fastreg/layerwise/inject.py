"""Dropout where a model has none: behind attention and MLP of its blocks, by forward hooks.

A hook is a plain function, and the rate lives in a module of its own beside the hook.  So models move, copy
and pickle as ever, a new rate compiles nothing anew, and no key is added to the `state_dict`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..nn import Dropout
from .knobs import INJECTED

BRANCH = re.compile(r"att(e)?n|mlp|ffn|feed_?forward|moe|mixer|experts", re.IGNORECASE)


def branches(block: nn.Module) -> list[str]:
    """The children of a block whose output a residual takes: attention and MLP, by their names."""
    return [
        name
        for name, child in block.named_children()
        if BRANCH.search(f"{name} {type(child).__name__}")
        and not re.search(r"norm|drop|gate$", f"{name} {type(child).__name__}", re.IGNORECASE)
        and any(True for _ in child.parameters())
    ]


def attach(module: nn.Module, rate: float) -> Dropout:
    """Drop from the output of a module; once only, however often this is called."""
    dropout = module._modules.get(INJECTED)
    if not isinstance(dropout, Dropout):
        place = next(module.parameters())
        dropout = Dropout(rate).to(place.device).train(module.training)
        module.add_module(INJECTED, dropout)
    if _drop not in module._forward_hooks.values():
        module.register_forward_hook(_drop)
    dropout.p = rate
    return dropout


def detach(module: nn.Module) -> None:
    """Undo `attach`."""
    module._modules.pop(INJECTED, None)
    hooks: dict[int, Callable[..., Any]] = module._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is _drop]:
        del hooks[key]


def _drop(module: nn.Module, args: Any, output: Any) -> Any:
    dropout = module._modules[INJECTED]
    assert dropout is not None
    if isinstance(output, Tensor):
        return dropout(output)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return (dropout(output[0]), *output[1:])
    raise TypeError(
        f"cannot drop from the output of {type(module).__name__}: it is a {type(output).__name__}, not a "
        "tensor or a tuple that starts with one"
    )
