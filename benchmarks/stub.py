"""Runs Triton's own launch path without a GPU, by a driver that compiles but launches nothing.

Kernels are specialised, looked up and compiled for a target as on a real device.  This shows the cost of a
launch on the host and the reasons to compile again, and it fills Triton's cache.
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
    """Returns Triton's target for the name of an architecture, such as "sm_90" or "gfx942".

    Raises:
        ValueError: If the name has another form.
    """
    if match := re.fullmatch(r"sm_(\d+)", name):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx[0-9a-f]{3,4}", name):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    raise ValueError(f"a target must be such as sm_90 or gfx942, got {name!r}")


TARGETS = {name: gpu_target(name) for name in ("sm_80", "sm_90", "sm_100", "gfx942")}
"""Targets of the code audit, by name."""


class OneDevice:
    """Mixin for Triton drivers that pretends there is one device, of a chosen target."""

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
    """Makes kernels on CPU tensors compile but not run in the block; yields the list of launched names."""
    launches: list[str] = []
    with active(_Driver(launches, gpu_target(target)), target):
        yield launches


@contextlib.contextmanager
def active(instead: DriverBase, target: str) -> Iterator[None]:
    """Makes CPU tensors use the Triton kernels in the block, compiled for a target, by a driver."""
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
        forget_compiled()  # before the driver that loaded the kernels goes
        driver._active = None  # `reset_active` would look for a real one


def variants() -> dict[str, int]:
    """Returns the number of compiled variants of each kernel, by name, without kernels that have none."""
    counts = {name: len(kernel.device_caches[0][0]) for name, kernel in entry_points().items()}
    return {name: count for name, count in counts.items() if count}


def compiled() -> list[Any]:
    """Returns all compiled variants of all kernels."""
    return [made for kernel in entry_points().values() for made in kernel.device_caches[0][0].values()]


def forget_compiled() -> None:
    """Forgets all compiled variants: one driver must not launch those of another."""
    for kernel in entry_points().values():
        kernel.device_caches.clear()
