"""Runs one optimizer step on the flat elements of one parameter, as the fused kernel does."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .random import PhiloxPosition

CHUNK = 2**20
"""Elements worked on at a time on a CPU: larger temporaries page-fault at every step (2.8 against 1.9 times
torch's speed with noise, 124 M parameters)."""


def step(
    chain: Any, parameter: Tensor, gradient: Tensor, buffers: Sequence[Tensor], units: Sequence[Tensor],
    device_scalars: Sequence[Tensor], rng_keys: Sequence[Tensor], step_scalars: Sequence[Tensor],
    at: PhiloxPosition,
) -> None:  # fmt: skip
    """Applies the stages of a `fastreg.engine.stage.Chain` in order; writes parameter and buffers in place.

    Args:
        chain: The stages and how the weight is stored.
        parameter: `[n]`, any floating dtype.
        gradient: `[n]`, read only.
        buffers: `[n]` each, those of the stages in order, then those of the storage.
        units: `[n]` each in compute precision, for every element the value of its unit.
        device_scalars: 0-d each in compute precision, device scalars of the stages in order.
        rng_keys: 0-d int64 each, integers of the stages in order, then those of the storage.
        step_scalars: 0-d each in compute precision, those of the stages in order.
        at: Where the elements lie, for random numbers.
    """
    stages = len(chain.stages)
    p, _ = run_stages(
        stages, True, chain, parameter, gradient, buffers, units, device_scalars, rng_keys, step_scalars, at
    )
    storage, memory = chain.storage, _memory(chain, parameter, buffers)
    keys = rng_keys[len(rng_keys) - len(storage.rng_keys) :] if storage.rng_keys else ()
    for name, value in zip(storage.targets, storage.write(p, at, *keys), strict=True):
        memory[name].copy_(value)


def run_stages(
    stages: int, store: bool, chain: Any, parameter: Tensor, gradient: Tensor, buffers: Sequence[Tensor],
    units: Sequence[Tensor], device_scalars: Sequence[Tensor], rng_keys: Sequence[Tensor],
    step_scalars: Sequence[Tensor], at: PhiloxPosition,
) -> tuple[Tensor, Any]:  # fmt: skip
    """Returns weight and update after so many `stages` of a chain, whose buffers are written if `store`.

    The other arguments are those of `step`.
    """
    compute = compute_dtype(parameter.dtype)
    memory = _memory(chain, parameter, buffers)
    p = chain.storage.read(*(memory[name] for name in chain.storage.sources)).to(compute)
    u: Any = gradient.to(compute)
    b = k = s = w = n = 0
    for stage in chain.stages[:stages]:
        state = buffers[b : b + len(stage.buffers)]
        arguments = [
            *(buffer.to(compute) for buffer in state),
            *units[k : k + len(stage.units)],
            *device_scalars[s : s + len(stage.device_scalars)],
            *rng_keys[w : w + len(stage.rng_keys)],
            *step_scalars[n : n + stage.step_scalars],
        ]
        if stage.momentum:
            prev_perturbation = arguments.pop(len(state))
            p = p + prev_perturbation * arguments[0]
        p, u, new = stage.reference(p, u, at, *arguments)
        u = (u, new[0]) if stage.momentum else u
        if store:
            for buffer, value in zip(state, new, strict=False):  # buffers that a stage only reads come last
                buffer.copy_(value)
        b += len(state)
        k += len(stage.units)
        s += len(stage.device_scalars)
        w += len(stage.rng_keys)
        n += stage.step_scalars
    return p, u


def _memory(chain: Any, parameter: Tensor, buffers: Sequence[Tensor]) -> dict[str, Tensor]:
    """Returns the tensors that the storage reads and writes, by name."""
    names = [buffer.name for buffer in chain.storage.buffers]
    return {"parameter": parameter, **dict(zip(names, buffers[len(buffers) - len(names) :], strict=True))}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the precision of the arithmetic: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scalar_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype of a device scalar, such as a norm: float64 if the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
