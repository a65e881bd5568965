"""Adds dropout behind attention and MLP of blocks that have none, by forward hooks.

The hook is a plain function, and the rate is in a module added beside it.  So models can be moved, copied and
pickled, new rates do not recompile, and no key is added to the `state_dict`.
"""

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from ..common.batches import map_first_tensor
from ..nn import Dropout
from .sites import INJECTED

BRANCH = re.compile(r"att(e)?n|mlp|ffn|feed_?forward|moe|mixer|experts", re.IGNORECASE)


def branches(block: nn.Module) -> list[str]:
    """Returns the names of the children of a block that are residual branches: attention and MLP."""
    return [
        name
        for name, child in block.named_children()
        if BRANCH.search(f"{name} {type(child).__name__}")
        and not re.search(r"norm|drop|gate$", f"{name} {type(child).__name__}", re.IGNORECASE)
        and any(True for _ in child.parameters())
    ]


def attach(module: nn.Module, rate: float) -> Dropout:
    """Adds dropout to the output of a module, or sets its rate if it was added before."""
    dropout = module._modules.get(INJECTED)
    if not isinstance(dropout, Dropout):
        device = next(module.parameters()).device
        dropout = Dropout(rate).to(device).train(module.training)
        module.add_module(INJECTED, dropout)
    if _drop not in module._forward_hooks.values():
        module.register_forward_hook(_drop)
    dropout.p = rate
    return dropout


def detach(module: nn.Module) -> None:
    """Removes what `attach` has added."""
    module._modules.pop(INJECTED, None)
    hooks: dict[int, Callable[..., Any]] = module._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is _drop]:
        del hooks[key]


def _drop(module: nn.Module, args: Any, output: Any) -> Any:
    dropout = module._modules[INJECTED]
    assert dropout is not None
    return map_first_tensor(module, output, dropout)
