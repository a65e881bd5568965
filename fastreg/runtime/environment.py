"""Reports versions, devices, and which backend runs on each of them and why."""

import dataclasses
import platform

import torch

from ..common.versions import installed_version
from . import backend, kernel_cache, programs


@dataclasses.dataclass(frozen=True)
class Device:
    """A device, and the backend that runs a step there.

    Attributes:
        name: Torch's name, such as "cuda:0".
        hardware: A description of the hardware.
        backend: The backend that runs a step, and why.
    """

    name: str
    hardware: str
    backend: str


@dataclasses.dataclass(frozen=True)
class Info:
    """The result of `fastreg.info()`; printed, it can be pasted into a bug report.

    Attributes:
        versions: Of fastreg and the packages it uses, or "not installed".
        platform: Operating system and processor.
        forced: The backend that `use_backend` or `FASTREG_BACKEND` asks for, "auto" by default.
        devices: The CPU, then accelerators.
        kernels: Kernels that `fastreg precompile` has compiled into Triton's cache, and its folder.
        programs: Compiled steps for CPUs that are kept for later processes, and their folder.
    """

    versions: dict[str, str]
    platform: str
    forced: str
    devices: tuple[Device, ...]
    kernels: tuple[str, ...]
    programs: str

    def __str__(self) -> str:
        lines = [f"{name:<14}{number}" for name, number in self.versions.items()]
        lines += [f"{'platform':<14}{self.platform}", f"{'backend':<14}{self.forced}"]
        for device in self.devices:
            lines += [f"{device.name:<14}{device.hardware}", f"{'':<14}{device.backend}"]
        for i, line in enumerate((*self.kernels, self.programs)):
            lines.append(f"{'' if i else 'cached':<14}{line}")
        return "\n".join(lines)


def info() -> Info:
    """Returns versions, devices, and which backend runs a step on each; see `fastreg.use_backend`."""
    packages = ("fastreg", "torch", "triton", "transformers")
    versions = {name: installed_version(name) or "not installed" for name in packages}
    versions["python"] = platform.python_version()
    if torch.version.cuda or torch.version.hip:
        versions["CUDA" if torch.version.cuda else "ROCm"] = str(torch.version.cuda or torch.version.hip)
    capability = torch.backends.cpu.get_cpu_capability()
    compiler = backend.compiler() or "no C++ compiler"
    cpu = f"{torch.get_num_threads()} threads, {capability}, {compiler}"
    devices = [Device("cpu", cpu, _why(torch.device("cpu")))]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        hardware = f"{gpu.name}, {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        devices.append(Device(f"cuda:{i}", hardware, _why(torch.device("cuda", i))))
    if torch.backends.mps.is_available():
        devices.append(Device("mps", platform.processor() or "Apple GPU", _why(torch.device("mps"))))
    return Info(
        versions, platform.platform(), backend.forced(), tuple(devices), tuple(_kernels()), _programs()
    )  # fmt: skip


def _kernels() -> list[str]:
    """Describes the kernels compiled ahead of time for GPUs."""
    folder = kernel_cache.folder()
    lines = [
        f"{cached.kernels} kernels for {cached.target} in {folder}"
        + ("" if cached.current else f", of another version: run fastreg precompile --target {cached.target}")
        for cached in kernel_cache.read(folder)
    ]
    return lines or [f"no kernels ahead of time; `fastreg precompile` compiles them into {folder}"]


def _programs() -> str:
    """Describes the steps of the `compiled` backend that are saved."""
    folder = programs.folder()
    if folder is None:
        return "no compiled steps: FASTREG_CACHE_DIR is off"
    count, size = programs.disk_usage()
    if not count and not programs.writable():
        return f"no compiled steps: {folder} cannot be written, FASTREG_CACHE_DIR names another folder"
    return f"{count} compiled steps, {size / 1e6:.1f} MB in {folder}"


def _why(device: torch.device) -> str:
    """Describes which backend runs small and large steps on a device."""
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
