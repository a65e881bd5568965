"""A driver that launches nothing: Triton's own launch path, compilation included, without a GPU.

Kernels are specialised, looked up and compiled for sm_90 as on a real device, so that what a launch costs
on the host and what makes it compile again can be seen anywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from fastreg import backend

from .entry_points import entry_points


class _Driver(DriverBase):
    def __init__(self, launches: list[str]) -> None:
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), object(), 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 232448},
        )

        def launcher(source: Any, metadata: Any) -> Any:
            return lambda *_: launches.append(source.name)

        self.launcher_cls = launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

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
def stub_driver() -> Iterator[list[str]]:
    """Within the block CPU tensors go to the kernels, which do nothing; gives the names launched."""
    launches: list[str] = []
    allowed = backend._no_triton
    _forget_compiled()
    driver.set_active(_Driver(launches))
    backend._no_triton = lambda device: None
    try:
        with backend.use_backend("triton"):
            yield launches
    finally:
        backend._no_triton = allowed
        driver._active = None  # `reset_active` would look for a real one
        _forget_compiled()


def _forget_compiled() -> None:
    """What has been compiled for one driver must not be launched by another."""
    for kernel in entry_points().values():
        kernel.device_caches.clear()
