"""The reference step through `torch.compile`: one pass over memory on a CPU.

A chain is compiled once per combination of dtypes, ahead of time, for any length.  Nothing recompiles
later: numbers and integers come in tensors, and no guard is checked, because the cache key below holds all
that they would check.  On a CPU the result is kept for later processes (`programs`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import programs
from .chain import Chain
from .reference.random import At
from .reference.step import run_stages, step

LENGTH = 2**20 + 7
"""An example of a length: equal to no other size, and long enough for Inductor to use all threads."""


Fused = Callable[[list[Tensor], Tensor, Tensor, Tensor], Any]


@functools.cache
def compiled_step(
    chain: Chain, dtypes: tuple[torch.dtype, ...], numbers: torch.dtype, device: torch.device, threads: int
) -> Fused:
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
    return _compile(functools.partial(step, chain), chain, dtypes, numbers, device)


@functools.cache
def compiled_norm(
    chain: Chain, stages: int, momentum: bool, largest: bool, absolute: bool,
    dtypes: tuple[torch.dtype, ...], numbers: torch.dtype, device: torch.device, threads: int,
) -> Fused:  # fmt: skip
    """Σ u², Σ |u| or max |u| after some stages of a chain, in double, called as `compiled_step`.

    Args:
        chain: The chain.
        stages: How many of its stages run.
        momentum: Whether u is the momentum that the last of them hands on.
        largest: Take the largest.
        absolute: Add up |u|.
        dtypes: Of the tensors.
        numbers: dtype of scalars and numbers.
        device: Where all of them are.
        threads: `torch.get_num_threads()`, which Inductor builds in.
    """

    def norm(*arguments: Any) -> Tensor:
        _, u = run_stages(stages, False, chain, *arguments)
        u = u[1] if momentum else u
        if largest:
            return u.abs().amax().double()
        return (u.double().abs() if absolute else u.double().square()).sum()

    return _compile(norm, chain, dtypes, numbers, device)


def _compile(
    body: Callable[..., Any], chain: Chain, dtypes: tuple[torch.dtype, ...], numbers: torch.dtype,
    device: torch.device,
) -> Fused:  # fmt: skip
    """Compile what takes the arguments of `reference.step` behind the chain."""

    def fused(tensors: list[Tensor], scalars: Tensor, integers: Tensor, numbers: Tensor) -> Any:
        parameter, gradient, *others = tensors
        buffers, units = others[:held], others[held:]
        first, stream, count, *words = integers.unbind()
        at = At(first, 0, stream, count)
        return body(parameter, gradient, buffers, units, scalars.unbind(), words, numbers.unbind(), at)

    held = len(chain.buffers)
    examples = (
        [torch.empty(LENGTH, dtype=dtype, device=device) for dtype in dtypes],
        torch.zeros(sum(len(stage.scalars) for stage in chain.stages), dtype=numbers, device=device),
        torch.zeros(3 + sum(len(link.words) for link in chain.links), dtype=torch.int64, device=device),
        torch.zeros(sum(stage.numbers for stage in chain.stages), dtype=numbers, device=device),
    )
    return compile_ahead(fused, examples)


def compile_ahead(function: Callable[..., Any], examples: tuple[Any, ...]) -> Callable[..., Any]:
    """A function of tensors, compiled for those of other sizes too; what a former process compiled is used.

    No guard is checked: the caller sees to it that dtypes, devices, dimensions and the number of threads are
    those of the examples, that no size is 0 or 1, and that no plain number is among the arguments.

    Args:
        function: It takes tensors and lists of tensors.
        examples: Arguments whose sizes are equal only where they always are; contiguous.
    """
    key = programs.key(function, examples)
    if key is None:
        return _compiled(function, examples)
    found = programs.load(key)
    if found is not None:
        return found
    before = programs.modules()
    compiled = _compiled(function, examples)
    try:
        program = programs.capture(compiled, examples, programs.modules()[len(before) :])
    except programs.Unexpected:
        return compiled
    programs.save(key, program)
    return program


def _compiled(function: Callable[..., Any], examples: tuple[Any, ...]) -> Callable[..., Any]:
    options: dict[str, Any] = {
        "size_asserts": False,
        "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
    }
    # Called through Dynamo, a step would spend 50 µs on each tensor; compiled ahead and unguarded, 12.
    with _ahead_of_time(), torch.no_grad():
        compiled = torch.compile(function, dynamic=True, fullgraph=True, options=options)
        ahead = compiled.aot_compile((examples, {}))  # type: ignore[attr-defined]
    ahead.disable_guard_check()
    return ahead


def _ahead_of_time() -> contextlib.AbstractContextManager[Any]:
    """Within the block torch compiles ahead of time, which torch 2.11 does only where it is told to.

    Numbers stay numbers: torch 2.11 would start anew where it cannot make tensors of them, which fails there.
    """
    config = importlib.import_module("torch._dynamo.config")
    wanted = {"enable_aot_compile": True, "specialize_float": True}
    return config.patch({name: value for name, value in wanted.items() if hasattr(config, name)})
