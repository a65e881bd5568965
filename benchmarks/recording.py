"""Records the launches of kernels on CPU tensors, with Triton's CUDA driver over a stand-in for libcuda.

The module `stub` replaces Triton's driver.  Here the driver and its C launcher are the real ones, and only
libcuda is replaced.  Every launch is recorded with its grid and with the parameters that it was passed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from fastreg.runtime import device

from . import stub

SOURCE = Path(__file__).with_name("libcuda.c")
OLDEST = 80
"""Oldest compute capability of NVIDIA GPUs that Triton compiles for, times ten."""


class _Last(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("function", ctypes.c_void_p),
        ("count", ctypes.c_int),
        ("parameters", ctypes.c_ulonglong * 256),
    ]


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel, as it reached the stand-in for libcuda.

    Attributes:
        kernel: Name of the kernel.
        grid: Programs in each dimension.
        threads: Threads of a program.
        parameters: Addresses and integers by name, as Triton's C launcher passed them to libcuda.
        arguments: The same as Python passed them to the kernel.
    """

    kernel: str
    grid: tuple[int, ...]
    threads: int
    parameters: dict[str, int]
    arguments: dict[str, int]


def nvidia_target(name: str) -> GPUTarget:
    """Returns Triton's target for an NVIDIA GPU such as "sm_90".

    Raises:
        ValueError: For a GPU that Triton's launcher for NVIDIA cannot be built for.
    """
    target = stub.gpu_target(name)
    if target.backend != "cuda" or int(target.arch) < OLDEST:
        raise ValueError(
            f"launchers are built for NVIDIA GPUs alone, from sm_{OLDEST} on: sm_80 (A100), sm_89 (L40), "
            f"sm_90 (H100, H200), sm_100 (B200) and others; got {name!r}"
        )
    return target


class _Driver(stub.OneDevice, nvidia.CudaDriver):
    """Triton's driver for NVIDIA, which does not ask torch whether there is a GPU."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher


@functools.cache
def _library() -> Any:
    """Returns the stand-in, compiled and loaded under the name of the real libcuda."""
    folder = tempfile.mkdtemp(prefix="fastreg-libcuda-")
    target = Path(folder) / "libcuda.so.1"
    include = Path(nvidia.__file__).with_name("include")
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-w", f"-I{include}", str(SOURCE)]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1", "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)
    library.recorded_last.restype = ctypes.POINTER(_Last)
    library.recorded_launches.restype = library.recorded_modules.restype = ctypes.c_long
    library.folder = folder
    return library


@contextlib.contextmanager
def recording_driver(target: str = "sm_90") -> Iterator[list[Launch]]:
    """Launches kernels on CPU tensors by Triton's own launcher in the block; yields a list of the launches.

    The kernels compute nothing.

    Args:
        target: NVIDIA GPU that kernels are compiled for, such as "sm_90".

    Raises:
        ValueError: For any other target.
        RuntimeError: If torch can use a GPU, or if a launch does not reach libcuda exactly once.
    """
    compiled_for = nvidia_target(target)
    if torch.cuda.is_available():
        raise RuntimeError("the stand-in for libcuda would take the place of the real one, which is loaded")
    library, launches = _library(), list[Launch]()
    launch = device.launch

    def recorded(kernel: Any, programs: int, where: Any, *arguments: Any, **constants: Any) -> None:
        parameters = _parameters(kernel, arguments)
        library.expect_parameters(len(parameters))
        before = library.recorded_launches()
        launch(kernel, programs, where, *arguments, **constants)
        if not programs:
            return
        if library.recorded_launches() != before + 1:
            raise RuntimeError(f"{kernel.__name__} was launched {library.recorded_launches() - before} times")
        last = library.recorded_last().contents
        received = (
            value & 0xFFFFFFFF if narrow else value
            for value, (_, narrow) in zip(last.parameters, parameters.values(), strict=False)
        )
        launches.append(
            Launch(
                kernel.__name__, tuple(last.grid), last.threads,
                dict(zip(parameters, received, strict=True)),
                {name: value for name, (value, _) in parameters.items()},
            )
        )  # fmt: skip

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"TRITON_LIBCUDA_PATH": library.folder}))
        for module in (device, *_launchers()):
            stack.enter_context(mock.patch.object(module, _name(module), recorded))
        stack.enter_context(stub.active(_Driver(compiled_for), target))
        yield launches


def _launchers() -> list[Any]:
    """Returns the modules that have imported the function that launches kernels."""
    from fastreg.engine.launch import triton
    from fastreg.ops import adversarial, ghost

    return [triton, adversarial, ghost]


def _name(module: Any) -> str:
    return "launch_kernel" if hasattr(module, "launch_kernel") else "launch"


def _parameters(kernel: Any, arguments: tuple[Any, ...]) -> dict[str, tuple[int, bool]]:
    """Returns the addresses and integers that a launch must pass, by name, and whether each has 32 bits."""
    addresses = {}
    named = list(zip(kernel.arg_names, arguments, strict=False))
    while named:
        name, value = named.pop(0)
        if isinstance(value, tuple):
            # Integers in tuples are columns: they come last, and Triton may compile them in.
            tensors = [(i, item) for i, item in enumerate(value) if isinstance(item, torch.Tensor)]
            named[:0] = ((f"{name}[{i}]", item) for i, item in tensors)
        elif isinstance(value, torch.Tensor):
            addresses[name] = value.data_ptr(), False
        elif isinstance(value, int):
            addresses[name] = value, abs(value) < 2**31
    return addresses
