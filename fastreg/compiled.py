"""The reference step through `torch.compile`: one pass over memory on a CPU.

A chain is compiled once per combination of dtypes, ahead of time, for any length.  Nothing recompiles
later: numbers and integers come in tensors, and no guard is checked, because the cache key below holds all
that they would check.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .chain import Chain
from .reference.random import At
from .reference.step import step

_LENGTH = 2**20 + 7
"""An example of a length: equal to no other size, and long enough for Inductor to use all threads."""


@functools.cache
def compiled_step(
    chain: Chain, dtypes: tuple[torch.dtype, ...], numbers: torch.dtype, device: torch.device, threads: int
) -> Callable[[list[Tensor], Tensor, Tensor, Tensor], None]:
    """The compiled form of `reference.step`, called as `(tensors, scalars, integers, numbers)`.

    `tensors` are parameter, gradient, buffers and units, flat; `integers` are first element, stream, step
    and the words of the chain, with a first element that is a multiple of 8.

    Args:
        chain: The chain to compile.
        dtypes: Of the tensors.
        numbers: dtype of scalars and numbers.
        device: Where all of them are.
        threads: `torch.get_num_threads()`, which Inductor builds in.
    """

    def fused_step(tensors: list[Tensor], scalars: Tensor, integers: Tensor, numbers: Tensor) -> None:
        parameter, gradient, *others = tensors
        buffers, units = others[:held], others[held:]
        first, stream, count, *words = integers.unbind()
        at = At(first, 0, stream, count)
        step(chain, parameter, gradient, buffers, units, scalars.unbind(), words, numbers.unbind(), at)

    held = len(chain.buffers)
    options: dict[str, Any] = {
        "size_asserts": False,
        "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
    }
    compiled = torch.compile(fused_step, dynamic=True, fullgraph=True, options=options)
    examples = (
        [torch.empty(_LENGTH, dtype=dtype, device=device) for dtype in dtypes],
        torch.zeros(sum(len(stage.scalars) for stage in chain.stages), dtype=numbers, device=device),
        torch.zeros(3 + sum(len(link.words) for link in chain.links), dtype=torch.int64, device=device),
        torch.zeros(sum(stage.numbers for stage in chain.stages), dtype=numbers, device=device),
    )
    # Called through Dynamo, a step would spend 50 µs on each tensor; compiled ahead and unguarded, 12.
    with torch.no_grad():
        ahead = compiled.aot_compile((examples, {}))  # type: ignore[attr-defined]
    ahead.disable_guard_check()
    return ahead
