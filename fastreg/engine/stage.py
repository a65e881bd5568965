"""Describes an optimizer step as data: buffers, stages and storage, joined to a chain.

A chain names the maths of each stage twice, as a kernel and as its reference, so that one description
runs on every backend.  Chains are hashable: code is compiled once per chain.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..common.validation import check_choice
from ..reference import storage as reference_storage


@dataclass(frozen=True)
class Buffer:
    """A state tensor of the shape of its parameter.

    Args:
        name: Its key in `optimizer.state[p]`.
        dtype: `"state"`, what the optimizer's `state_dtype` says; `"parameter"`; `"compute"`, float32 or, for
            float64 parameters, float64; or a dtype.
        init: Its first content, `"zeros"` or the `"parameter"`.
    """

    name: str
    dtype: torch.dtype | Literal["state", "parameter", "compute"] = "state"
    init: Literal["zeros", "parameter"] = "zeros"

    def __post_init__(self) -> None:
        """Refuses another `init`."""
        check_choice("init", self.init, ("zeros", "parameter"))


@dataclass(frozen=True)
class Stage:
    """Element-wise maths, `(p, u, at, *buffers, *units, *device_scalars, *rng_keys, *step_scalars)`.

    It returns the weight, the update and the new contents of the buffers.

    Args:
        kernel: The `@triton.jit` function, or its name in `fastreg_kernels` as `"module.function"`.
        reference: The same function in PyTorch.
        buffers: The state that it reads; it writes the first ones, as many as it returns.
        device_scalars: Names of the float64 device scalars it reads.
        rng_keys: Names of the integers it takes, such as a random key.
        step_scalars: How many numbers it takes, which may change with every step.
        units: Names of the values it reads once per unit: row of a matrix, output channel of a convolution.
        momentum: For MSAM.  Before it runs, first device scalar × first buffer (the momentum) is added to the
            weight; it returns the pair (update, new momentum) as its update.
        exact: Whether a GPU must not fuse its multiply-adds, so that it rounds as the reference does.

    Raises:
        TypeError: If the reference takes another number of arguments.
    """

    kernel: Any
    reference: Callable[..., Any]
    buffers: tuple[Buffer, ...] = ()
    device_scalars: tuple[str, ...] = ()
    rng_keys: tuple[str, ...] = ()
    step_scalars: int = 0
    units: tuple[str, ...] = ()
    momentum: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        """Refuses a reference that does not take the declared arguments."""
        code = getattr(self.reference, "__code__", None)
        names = *self.units, *self.device_scalars[self.momentum :], *self.rng_keys
        count = 3 + len(self.buffers) + len(names) + self.step_scalars
        if code is not None and not code.co_flags & inspect.CO_VARARGS and code.co_argcount != count:
            raise TypeError(
                f"{self.reference.__name__} must take {count} arguments, got {code.co_argcount}: p, u, at, "
                f"{len(self.buffers)} buffers, {len(self.units)} units, {len(self.device_scalars)} device "
                f"scalars, {len(self.rng_keys)} random keys and {self.step_scalars} step scalars"
            )


@dataclass(frozen=True)
class Storage:
    """How the weight is read from and written to memory.

    Args:
        kernels: The `@triton.jit` functions that read and write, or their names in `fastreg_kernels`.
        read: Reference of the first, `(*sources) -> weight`.
        write: Reference of the second, `(weight, at, *rng_keys) -> targets`.
        sources: Memory that the weight is read from: `"parameter"` or names of `buffers`.
        targets: Memory that it is written to, named in the same way.
        buffers: State it needs besides the parameter.
        rng_keys: Names of the integers that writing takes.
    """

    kernels: tuple[Any, Any] = ("storage.read_plain", "storage.write_plain")
    read: Callable[..., Any] = reference_storage.read_plain
    write: Callable[..., Any] = reference_storage.write_plain
    sources: tuple[str, ...] = ("parameter",)
    targets: tuple[str, ...] = ("parameter",)
    buffers: tuple[Buffer, ...] = ()
    rng_keys: tuple[str, ...] = ()


PLAIN = Storage()


@dataclass(frozen=True)
class Chain:
    """Stages in the order in which they run, and the storage around them."""

    stages: tuple[Stage, ...]
    storage: Storage = PLAIN

    @property
    def links(self) -> tuple[Stage | Storage, ...]:
        """Stages and storage, in the order in which their buffers and random keys are laid out."""
        return (*self.stages, self.storage)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """All buffers of the links, in order."""
        return tuple(buffer for link in self.links for buffer in link.buffers)

    @property
    def units(self) -> tuple[str, ...]:
        """Names of all values that are read once per unit, in order."""
        return tuple(name for stage in self.stages for name in stage.units)

    @property
    def random(self) -> bool:
        """Whether anything draws random numbers."""
        return any(link.rng_keys for link in self.links)
