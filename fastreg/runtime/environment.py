"""What fastreg finds on a machine: versions, devices, and which backend runs where and why."""

from __future__ import annotations

import dataclasses
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import backend, kernel_cache, programs


@dataclasses.dataclass(frozen=True)
class Device:
    """A device, and what runs a step there.

    Attributes:
        name: As torch calls it, such as "cuda:0".
        hardware: What it is.
        backend: What runs a step, and why.
    """

    name: str
    hardware: str
    backend: str


@dataclasses.dataclass(frozen=True)
class Info:
    """What `fastreg.info()` tells; printed, it can be pasted into a bug report.

    Attributes:
        versions: Of fastreg and what it runs on; "not installed" where that is so.
        platform: Operating system and processor.
        forced: What `use_backend` or `FASTREG_BACKEND` ask for, "auto" by default.
        devices: The CPU, then accelerators.
        kernels: What `fastreg precompile` has compiled into Triton's cache, and where that is.
        programs: Compiled steps for CPUs that are kept for later processes, and where.
    """

    versions: dict[str, str]
    platform: str
    forced: str
    devices: tuple[Device, ...]
    kernels: tuple[str, ...]
    programs: str

    def __str__(self) -> str:
        """Readable lines."""
        lines = [f"{name:<14}{number}" for name, number in self.versions.items()]
        lines += [f"{'platform':<14}{self.platform}", f"{'backend':<14}{self.forced}"]
        for device in self.devices:
            lines += [f"{device.name:<14}{device.hardware}", f"{'':<14}{device.backend}"]
        for i, line in enumerate((*self.kernels, self.programs)):
            lines.append(f"{'' if i else 'cached':<14}{line}")
        return "\n".join(lines)


def info() -> Info:
    """Versions, devices, and which backend runs a step on each and why; see `fastreg.use_backend`."""
    versions = {name: _version(name) for name in ("fastreg", "torch", "triton", "transformers")}
    versions["python"] = platform.python_version()
    if torch.version.cuda or torch.version.hip:
        versions["CUDA" if torch.version.cuda else "ROCm"] = str(torch.version.cuda or torch.version.hip)
    capability = torch.backends.cpu.get_cpu_capability()
    compiler = backend.compiler() or "no C++ compiler"
    cpu = f"{torch.get_num_threads()} threads, {capability}, {compiler}"
    devices = [Device("cpu", cpu, _why(torch.device("cpu")))]
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        hardware = f"{found.name}, {found.major}.{found.minor}, {found.total_memory / 2**30:.0f} GiB"
        devices.append(Device(f"cuda:{i}", hardware, _why(torch.device("cuda", i))))
    if torch.backends.mps.is_available():
        devices.append(Device("mps", platform.processor() or "Apple GPU", _why(torch.device("mps"))))
    return Info(
        versions, platform.platform(), backend.forced(), tuple(devices), tuple(_kernels()), _programs()
    )  # fmt: skip


def _kernels() -> list[str]:
    """What was compiled ahead of time for GPUs, in words."""
    place = kernel_cache.folder()
    found = [
        f"{cached.kernels} kernels for {cached.target} in {place}"
        + ("" if cached.current else f", of another version: run fastreg precompile --target {cached.target}")
        for cached in kernel_cache.read(place)
    ]
    return found or [f"no kernels ahead of time; `fastreg precompile` compiles them into {place}"]


def _programs() -> str:
    """Which steps of the `compiled` backend are kept, in words."""
    place = programs.folder()
    if place is None:
        return "no compiled steps: FASTREG_CACHE_DIR is off"
    count, size = programs.disk_usage()
    if not count and not programs.writable():
        return f"no compiled steps: {place} cannot be written, FASTREG_CACHE_DIR names another folder"
    return f"{count} compiled steps, {size / 1e6:.1f} MB in {place}"


def _why(device: torch.device) -> str:
    """What runs a step on a device, small or large, in words."""
    try:
        small, large = (backend.resolve(device, count) for count in (1, backend.COMPILE_FROM))
    except RuntimeError as error:
        return f"impossible: {error}"
    if small != large:
        return f"{large} from {backend.COMPILE_FROM:,} elements on, {small} below"
    if backend.forced() != "auto":
        return f"{small}, as asked for"
    if small == "triton":
        return "triton"
    return f"{small}: {backend.why_reference(device)}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
