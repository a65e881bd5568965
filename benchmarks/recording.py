"""Triton's own CUDA driver and launcher over a stand-in for libcuda: what would reach a GPU, on a CPU.

`stub` replaces Triton's driver; here it is the real one, with its C launcher, and only the library below it
is not NVIDIA's.  Every launch is recorded with its grid and with the parameters that C handed over.
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
"""The compute capability, times ten, from which on Triton compiles for NVIDIA's GPUs."""


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
    """What C was about to launch.

    Attributes:
        kernel: Its name.
        grid: Programs in each dimension.
        threads: Of a program.
        parameters: Addresses and integers by name, as C handed them over.
        given: What Python gave for them.
    """

    kernel: str
    grid: tuple[int, ...]
    threads: int
    parameters: dict[str, int]
    arguments: dict[str, int]


def nvidia_target(name: str) -> GPUTarget:
    """What Triton calls a target that its launcher for NVIDIA can be built for.

    Raises:
        ValueError: For any other.
    """
    target = stub.gpu_target(name)
    if target.backend != "cuda" or int(target.arch) < OLDEST:
        raise ValueError(
            f"launchers are built for NVIDIA GPUs alone, from sm_{OLDEST} on: sm_80 (A100), sm_89 (L40), "
            f"sm_90 (H100, H200), sm_100 (B200) and others; got {name!r}"
        )
    return target


class _Driver(stub.OneDevice, nvidia.CudaDriver):
    """Triton's driver for NVIDIA, without torch asking whether there is a GPU."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher


@functools.cache
def _library() -> Any:
    """The stand-in, built and loaded under the name of the real one."""
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
    """Within the block CPU tensors go to the kernels by Triton's own launcher; gives what it launched.

    Args:
        target: What kernels are compiled for: an NVIDIA GPU, such as "sm_90".

    Raises:
        ValueError: For any other target.
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
    """The modules that launch kernels."""
    from fastreg.engine.launch import triton
    from fastreg.ops import adversarial, ghost

    return [triton, adversarial, ghost]


def _name(module: Any) -> str:
    return "launch_kernel" if hasattr(module, "launch_kernel") else "launch"


def _parameters(kernel: Any, arguments: tuple[Any, ...]) -> dict[str, tuple[int, bool]]:
    """What Triton's launcher hands to the driver: addresses and integers, and whether these have 32 bits."""
    addresses = {}
    named = list(zip(kernel.arg_names, arguments, strict=False))
    while named:
        name, value = named.pop(0)
        if isinstance(value, tuple):
            # Of stages and storages only columns would follow, which Triton may compile in.
            tensors = [(i, item) for i, item in enumerate(value) if isinstance(item, torch.Tensor)]
            named[:0] = ((f"{name}[{i}]", item) for i, item in tensors)
        elif isinstance(value, torch.Tensor):
            addresses[name] = value.data_ptr(), False
        elif isinstance(value, int):
            addresses[name] = value, abs(value) < 2**31
    return addresses
