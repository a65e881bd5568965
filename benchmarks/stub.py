"""A driver that launches nothing: Triton's own launch path, compilation included, without a GPU.

Kernels are specialised, looked up and compiled for a target as on a real device, so that what a launch costs
on the host and what makes it compile again can be seen anywhere, and Triton's cache can be filled.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from fastreg.runtime import backend, device
from fastreg.runtime.launch_parameters import Architecture

from .entry_points import entry_points


def gpu_target(name: str) -> GPUTarget:
    """What Triton calls a target.

    Raises:
        ValueError: If the name is not that of an architecture.
    """
    if match := re.fullmatch(r"sm_(\d+)", name):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx[0-9a-f]{3,4}", name):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    raise ValueError(f"a target must be such as sm_90 or gfx942, got {name!r}")


TARGETS = {name: gpu_target(name) for name in ("sm_80", "sm_90", "sm_100", "gfx942")}
"""What the audit reads."""


class OneDevice:
    """What a driver is asked about devices, answered for one of a chosen target, without a GPU."""

    _target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    @classmethod
    def is_active(cls) -> bool:
        return True


class _Driver(OneDevice, DriverBase):
    def __init__(self, launches: list[str], target: GPUTarget = TARGETS["sm_90"]) -> None:
        self._target = target
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), object(), 0, 0, 1024),
            unload_module=lambda *_: None,
            get_device_properties=lambda _: {"max_shared_mem": 232448},
        )

        def launcher(source: Any, metadata: Any) -> Any:
            return lambda *_: launches.append(source.name)

        self.launcher_cls = launcher

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError


@contextlib.contextmanager
def stub_driver(target: str = "sm_90") -> Iterator[list[str]]:
    """Within the block CPU tensors go to the kernels, which do nothing; gives the names launched."""
    launches: list[str] = []
    with active(_Driver(launches, gpu_target(target)), target):
        yield launches


@contextlib.contextmanager
def active(instead: DriverBase, target: str) -> Iterator[None]:
    """Within the block CPU tensors go to the kernels by way of a driver, for a target."""
    allowed, lanes = backend.why_not_triton, gpu_target(target).warp_size
    forget_compiled()
    driver.set_active(instead)
    backend.why_not_triton = lambda device: None
    try:
        with (
            backend.use_backend("triton"),
            device.assumed(Architecture(target, lanes, device.H200.multiprocessors)),
        ):
            yield
    finally:
        backend.why_not_triton = allowed
        forget_compiled()  # while there is the driver that has loaded it
        driver._active = None  # `reset_active` would look for a real one


def variants() -> dict[str, int]:
    """How many variants of each kernel have been compiled for the driver."""
    counts = {name: len(kernel.device_caches[0][0]) for name, kernel in entry_points().items()}
    return {name: count for name, count in counts.items() if count}


def compiled() -> list[Any]:
    """All variants of all kernels that have been compiled for the driver."""
    return [made for kernel in entry_points().values() for made in kernel.device_caches[0][0].values()]


def forget_compiled() -> None:
    """What has been compiled for one driver must not be launched by another."""
    for kernel in entry_points().values():
        kernel.device_caches.clear()
