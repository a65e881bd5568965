"""A driver that launches nothing: Triton's own launch path, compilation included, without a GPU.

Kernels are specialised, looked up and compiled for a target as on a real device, so that what a launch costs
on the host and what makes it compile again can be seen anywhere, and Triton's cache can be filled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from fastreg import backend, device
from fastreg.launch_parameters import Architecture

from .entry_points import entry_points

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _Driver(DriverBase):
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

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    @classmethod
    def is_active(cls) -> bool:
        return True

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
    with active(_Driver(launches, TARGETS[target]), target):
        yield launches


@contextlib.contextmanager
def active(instead: DriverBase, target: str) -> Iterator[None]:
    """Within the block CPU tensors go to the kernels by way of a driver, for a target."""
    allowed, lanes = backend._no_triton, TARGETS[target].warp_size
    _forget_compiled()
    driver.set_active(instead)
    backend._no_triton = lambda device: None
    try:
        with (
            backend.use_backend("triton"),
            device.assumed(Architecture(target, lanes, device.H200.multiprocessors)),
        ):
            yield
    finally:
        backend._no_triton = allowed
        _forget_compiled()  # while there is the driver that has loaded it
        driver._active = None  # `reset_active` would look for a real one


def variants() -> dict[str, int]:
    """How many variants of each kernel have been compiled for the driver."""
    found = {name: len(kernel.device_caches[0][0]) for name, kernel in entry_points().items()}
    return {name: count for name, count in found.items() if count}


def _forget_compiled() -> None:
    """What has been compiled for one driver must not be launched by another."""
    for kernel in entry_points().values():
        kernel.device_caches.clear()
