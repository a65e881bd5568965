"""The reference step through `torch.compile`: one pass over memory on a CPU.

A chain is compiled once per combination of dtypes.  Nothing recompiles later: lengths are dynamic, numbers
and integers come in tensors, and guards are dropped because the cache key below holds all they would check.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .chain import Chain
from .reference.random import At
from .reference.step import step


def compiled_step(chain: Chain, tensors: Sequence[Tensor], scalars: Sequence[Tensor]) -> Callable[..., None]:
    """The compiled form of `reference.step` for tensors like these: call it as `(tensors, scalars, integers, numbers)`.

    Args:
        chain: The chain to compile.
        tensors: Parameter, gradient and buffers, flat.
        scalars: Device scalars.
    """
    return _compile(chain, tuple(t.dtype for t in tensors), tensors[0].device.type, torch.get_num_threads())


@functools.cache
def _compile(chain: Chain, dtypes: tuple[torch.dtype, ...], device: str, threads: int) -> Callable[..., None]:
    def fused_step(tensors: list[Tensor], scalars: list[Tensor], integers: Tensor, numbers: Tensor) -> None:
        parameter, gradient, *buffers = tensors
        first, stream, count, *words = integers.unbind()
        step(chain, parameter, gradient, buffers, scalars, words, numbers.unbind(), At(first, 0, stream, count))

    # Dynamo caches per code object, and this one is shared by all chains.
    own = types.FunctionType(
        fused_step.__code__.replace(), fused_step.__globals__, fused_step.__name__, None, fused_step.__closure__
    )
    options: dict[str, Any] = {"size_asserts": False}
    if skip_guards := getattr(torch.compiler, "skip_all_guards_unsafe", None):
        options["guard_filter_fn"] = skip_guards
    return torch.compile(own, dynamic=True, fullgraph=True, options=options)
