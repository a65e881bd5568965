"""Compiles the reference step by `torch.compile`: one pass over memory on a CPU.

A chain is compiled once per combination of dtypes, ahead of time, for any length.  Nothing recompiles
later: numbers and integers come in tensors, and no guard is checked, because the cache key below holds
everything that guards would check.  On a CPU the result is kept for later processes (`programs`).
"""

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
    chain: Chain, dtypes: tuple[torch.dtype, ...], compute: torch.dtype, device: torch.device,
    threads: int,
) -> Fused:  # fmt: skip
    """Returns `reference.step` compiled, called as `(tensors, device_scalars, integers, step_scalars)`.

    `tensors` are parameter, gradient, buffers and units, flat; `integers` are first element, stream, step
    and the random keys of the chain, with a first element that is a multiple of 8.

    Args:
        chain: The chain to compile.
        dtypes: The dtypes of the tensors.
        compute: The dtype of device scalars and step scalars.
        device: The device of all of them.
        threads: `torch.get_num_threads()`, which Inductor builds in.
    """
    return _compile(functools.partial(step, chain), chain, dtypes, compute, device)


@functools.cache
def compiled_norm(
    chain: Chain, stages: int, kind: str, dtypes: tuple[torch.dtype, ...], compute: torch.dtype,
    device: torch.device, threads: int,
) -> Fused:  # fmt: skip
    """Returns a function for Σ u², Σ |u| or max |u| after some stages, in double, called as `compiled_step`.

    Args:
        chain: The chain.
        stages: How many of its stages run.
        kind: The norm, see `NormSpec`.
        dtypes: The dtypes of the tensors; this and the rest as for `compiled_step`.
        compute: The dtype of device scalars and step scalars.
        device: The device of all of them.
        threads: `torch.get_num_threads()`.
    """

    def norm(*arguments: Any) -> Tensor:
        _, u = run_stages(stages, False, chain, *arguments)
        u = u[1] if kind == "momentum" else u
        if kind == "largest":
            return u.abs().amax().double()
        return (u.double().abs() if kind == "absolute" else u.double().square()).sum()

    return _compile(norm, chain, dtypes, compute, device)


def _compile(
    body: Callable[..., Any], chain: Chain, dtypes: tuple[torch.dtype, ...], compute: torch.dtype,
    device: torch.device,
) -> Fused:  # fmt: skip
    """Compiles a function of the arguments of `reference.step` after the chain."""

    def fused(tensors: list[Tensor], device_scalars: Tensor, integers: Tensor, step_scalars: Tensor) -> Any:
        parameter, gradient, *others = tensors
        buffers, units = others[:count], others[count:]
        first, stream, step_count, *rng_keys = integers.unbind()
        at = PhiloxPosition(first, 0, stream, step_count)
        return body(
            parameter, gradient, buffers, units, device_scalars.unbind(), rng_keys, step_scalars.unbind(), at
        )

    count = len(chain.buffers)
    examples = (
        [torch.empty(LENGTH, dtype=dtype, device=device) for dtype in dtypes],
        torch.zeros(sum(len(stage.device_scalars) for stage in chain.stages), dtype=compute, device=device),
        torch.zeros(3 + sum(len(link.rng_keys) for link in chain.links), dtype=torch.int64, device=device),
        torch.zeros(sum(stage.step_scalars for stage in chain.stages), dtype=compute, device=device),
    )
    return compile_ahead(fused, examples)
