"""The reference step through `torch.compile`: one pass over memory on a CPU.

A chain is compiled once per combination of dtypes, ahead of time, for any length.  Nothing recompiles
later: numbers and integers come in tensors, and no guard is checked, because the cache key below holds all
that they would check.  On a CPU the result is kept for later processes (`programs`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...reference.random import PhiloxPosition
from ...reference.step import run_stages, step
from ...runtime.compile_ahead import LENGTH, compile_ahead
from ..stage import Chain

Fused = Callable[[list[Tensor], Tensor, Tensor, Tensor], Any]


@functools.cache
def compiled_step(
    chain: Chain,
    dtypes: tuple[torch.dtype, ...],
    step_scalars: torch.dtype,
    device: torch.device,
    threads: int,
) -> Fused:
    """The compiled form of `reference.step`, called as `(tensors, device_scalars, integers, step_scalars)`.

    `tensors` are parameter, gradient, buffers and units, flat; `integers` are first element, stream, step
    and the words of the chain, with a first element that is a multiple of 8.

    Args:
        chain: The chain to compile.
        dtypes: Of the tensors.
        step_scalars: dtype of scalars and numbers.
        device: Where all of them are.
        threads: `torch.get_num_threads()`, which Inductor builds in.
    """
    return _compile(functools.partial(step, chain), chain, dtypes, step_scalars, device)


@functools.cache
def compiled_norm(
    chain: Chain, stages: int, momentum: bool, largest: bool, absolute: bool,
    dtypes: tuple[torch.dtype, ...], step_scalars: torch.dtype, device: torch.device, threads: int,
) -> Fused:  # fmt: skip
    """Σ u², Σ |u| or max |u| after some stages of a chain, in double, called as `compiled_step`.

    Args:
        chain: The chain.
        stages: How many of its stages run.
        momentum: Whether u is the momentum that the last of them hands on.
        largest: Take the largest.
        absolute: Add up |u|.
        dtypes: Of the tensors.
        step_scalars: dtype of scalars and numbers.
        device: Where all of them are.
        threads: `torch.get_num_threads()`, which Inductor builds in.
    """

    def norm(*arguments: Any) -> Tensor:
        _, u = run_stages(stages, False, chain, *arguments)
        u = u[1] if momentum else u
        if largest:
            return u.abs().amax().double()
        return (u.double().abs() if absolute else u.double().square()).sum()

    return _compile(norm, chain, dtypes, step_scalars, device)


def _compile(
    body: Callable[..., Any], chain: Chain, dtypes: tuple[torch.dtype, ...], step_scalars: torch.dtype,
    device: torch.device,
) -> Fused:  # fmt: skip
    """Compile what takes the arguments of `reference.step` behind the chain."""

    def fused(tensors: list[Tensor], device_scalars: Tensor, integers: Tensor, step_scalars: Tensor) -> Any:
        parameter, gradient, *others = tensors
        buffers, units = others[:held], others[held:]
        first, stream, count, *rng_keys = integers.unbind()
        at = PhiloxPosition(first, 0, stream, count)
        return body(
            parameter, gradient, buffers, units, device_scalars.unbind(), rng_keys, step_scalars.unbind(), at
        )

    held = len(chain.buffers)
    examples = (
        [torch.empty(LENGTH, dtype=dtype, device=device) for dtype in dtypes],
        torch.zeros(
            sum(len(stage.device_scalars) for stage in chain.stages), dtype=step_scalars, device=device
        ),
        torch.zeros(3 + sum(len(link.rng_keys) for link in chain.links), dtype=torch.int64, device=device),
        torch.zeros(sum(stage.step_scalars for stage in chain.stages), dtype=step_scalars, device=device),
    )
    return compile_ahead(fused, examples)
