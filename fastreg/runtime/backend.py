"""Decides which backend runs a step, for the whole package.

| backend     | where                                            | what runs                             |
|-------------|--------------------------------------------------|---------------------------------------|
| `triton`    | CUDA and ROCm tensors                            | the kernels                           |
| `compiled`  | CPU, from 1 M elements on, with a C++ compiler   | the reference through `torch.compile` |
| `reference` | everywhere                                       | plain PyTorch                         |
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import warnings
from types import TracebackType
from typing import Literal, get_args

import torch

Backend = Literal["triton", "compiled", "reference"]

COMPILE_FROM = 1_000_000
"""Fewest elements in a step for which compiling the reference pays on a CPU."""

VARIABLE = "FASTREG_BACKEND"
override: str | None = None
"""The backend that `use_backend` has chosen; if it was never called, `None`, and the variable decides."""

_compiles = True


class use_backend:  # noqa: N801  (used like a function)
    """Forces a backend, from now on or for a `with` block.

    `fastreg.use_backend("reference")` holds until the next call; `with fastreg.use_backend("reference"):`
    restores the previous choice at the end.  The environment variable `FASTREG_BACKEND` sets the first one.

    Args:
        name: `"auto"`, `"triton"`, `"compiled"` or `"reference"`.

    Raises:
        ValueError: If there is no such backend.
    """

    def __init__(self, name: str) -> None:
        global override
        self._previous, override = override, _checked(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global override
        override = self._previous


def _checked(name: str, source: str = "backend") -> str:
    if name not in ("auto", *get_args(Backend)):
        raise ValueError(f"{source} must be 'auto', 'triton', 'compiled' or 'reference', got {name!r}")
    return name


def forced() -> str:
    """Returns the backend that `use_backend` or `FASTREG_BACKEND` asks for, `"auto"` by default."""
    return override or _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)


def resolve(device: torch.device, elements: int) -> Backend:
    """Returns the backend for a step over `elements` elements on `device`.

    Raises:
        RuntimeError: If the forced backend cannot run there; the message says why.
    """
    name = forced()
    if name == "triton":
        if reason := why_not_triton(device):
            raise RuntimeError(f"backend 'triton' cannot run on {device.type} tensors: {reason}")
        return "triton"
    if name == "compiled":
        if device.type == "cpu" and not has_compiler():
            raise RuntimeError(
                "backend 'compiled' needs a C++ compiler on a CPU: none of $CXX, g++, clang++, c++ found"
            )
        return "compiled"
    if name == "reference":
        return "reference"
    if not why_not_triton(device) and device.type == "cuda":
        return "triton"
    if device.type == "cpu" and elements >= COMPILE_FROM and has_compiler() and _compiles:
        return "compiled"
    return "reference"


def why_reference(device: torch.device) -> str:
    """Returns why `auto` chooses the reference for every step on a device."""
    if device.type != "cpu":
        return why_not_triton(device) or "only CUDA and ROCm devices run the kernels"
    if not has_compiler():
        return "no C++ compiler, none of $CXX, g++, clang++, c++ found"
    return "compiling the step has failed in this process"


def cannot_compile(error: Exception) -> None:
    """Records that compiling failed: `auto` takes the reference from now on, a forced backend raises.

    Args:
        error: The error of the compiler.
    """
    global _compiles
    if forced() == "compiled":
        raise error
    _compiles = False
    warnings.warn(
        "compiling the step failed, so that it runs uncompiled and takes several times as long. "
        "Install a C++ compiler, or name one in CXX; FASTREG_BACKEND=reference turns compiling off. "
        f"torch.compile said: {error}",
        RuntimeWarning,
        stacklevel=2,
    )


def why_not_triton(device: torch.device) -> str | None:
    """Returns why no kernel runs on a device, `None` if kernels run there."""
    if not has_triton():
        return "triton is not installed"
    if device.type == "cuda" or (device.type == "cpu" and interpreted()):
        return None
    if device.type == "cpu":
        return "set TRITON_INTERPRET=1 before the first use to run the kernels in Triton's interpreter"
    return "only CUDA and ROCm devices are supported"


def interpreted() -> bool:
    """Returns whether kernels run in Triton's interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def has_triton() -> bool:
    """Returns whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def has_compiler() -> bool:
    """Returns whether a C++ compiler is on the path."""
    return compiler() is not None


def compiler() -> str | None:
    """Returns the name of a C++ compiler on the path, if there is one."""
    names = os.environ.get("CXX", ""), "g++", "clang++", "c++"
    return next((name for name in names if name and shutil.which(name)), None)
