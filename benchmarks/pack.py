"""Compiles the kernels for all stages of `gpu` and packs them into one file, with Triton's launchers.

    python -m fastreg_benchmarks.pack [--target sm_90] [FILE]

Run it with the versions of Python, torch and triton that the machine with the GPU has: cache keys and
launchers are valid for these only.  No GPU is needed.  `benchmarks/gpu.sh` unpacks the file there.

Targets are NVIDIA GPUs from sm_80 on: sm_80 (A100), sm_90 (H100, H200), sm_100 (B200) and others.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import shutil
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import torch
import triton

from fastreg.runtime import device
from fastreg.runtime.launch_parameters import Architecture

from . import device_tests, precompile, recording, tune

CACHE = Path("/tmp/fastreg-triton")
"""Folder of the cache, the same on every machine: Triton writes absolute paths into it.  Its code is run."""
FILE = Path("benchmarks/results/.carry/triton.tar.gz")


def claim(folder: Path) -> None:
    """Empties a folder or makes it, so that only its owner can write to it.

    Raises:
        PermissionError: If it exists and is not a folder, belongs to another user, or others can write to it.
    """
    if os.path.lexists(folder):
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise PermissionError(
                f"{folder} is not a folder that you alone can write to, and what is in it is run: "
                "remove it, or have its owner remove it"
            )
        shutil.rmtree(folder)
    folder.mkdir(mode=0o700)


def tests(jobs: int, target: str) -> None:
    """Compiles the kernels of the stage `tests` into `CACHE`; the tests fail, because nothing is computed."""
    files = [str(device_tests.ROOT / file) for file in device_tests.FILES]
    command = [
        sys.executable, "-m", "pytest", "-q", "--tb=no", "-W", "ignore", "-p", "no:cacheprovider",
        "-p", "fastreg_benchmarks.compile_only", "-n", str(jobs), "--rootdir", str(device_tests.ROOT), *files,
    ]  # fmt: skip
    environment = {**os.environ, "TRITON_CACHE_DIR": str(CACHE), "FASTREG_TARGET": target}
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)


def settings(target: str) -> None:
    """Compiles the kernels of the stage `tune` into `CACHE`, with every setting, in another process."""
    code = f"from fastreg_benchmarks import pack; pack.tried({target!r})"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(CACHE), "TRITON_STORE_BINARY_ONLY": "1"}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def tried(target: str) -> None:
    """Runs the trials of `tune` on small CPU tensors, with every setting and a driver that runs nothing."""
    architecture = Architecture(target, 32, device.H200.multiprocessors)
    with recording.recording_driver(target):
        for trial in tune.TRIALS.values():
            for setting in tune.settings(trial, architecture):
                tune.with_setting(trial.kernel, setting, functools.partial(_made, trial))


def _made(trial: tune.Trial) -> None:
    trial.make(torch.device("cpu"), True)[0]()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 1 if a kernel did not compile, else 0."""
    parser = argparse.ArgumentParser(prog="python -m fastreg_benchmarks.pack", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=FILE, metavar="FILE", help=f"(default: {FILE})")
    parser.add_argument("--target", default="sm_90", help="sm_80 or later (default: sm_90)")
    options = parser.parse_args(arguments)
    try:
        recording.nvidia_target(options.target)
        claim(CACHE)
    except ValueError as error:
        parser.error(f"--target: {error}")
    except PermissionError as error:
        parser.exit(2, f"{error}\n")
    start, jobs = time.monotonic(), os.cpu_count() or 1
    print(f"for Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}")
    filled = precompile.fill(options.target, CACHE, precompile.items(), jobs, driver="recording")
    print(f"all that is shipped: {filled.kernels} kernels", *filled.failed.values())
    settings(options.target)
    tests(jobs, options.target)
    precompile.strip(CACHE, set(precompile.hashes(CACHE)))
    options.file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(options.file, "w:gz") as packed:
        packed.add(CACHE, CACHE.name)
    kernels, size = len(precompile.hashes(CACHE)), options.file.stat().st_size
    print(f"{options.file}: {kernels} kernels, {size / 1e6:.1f} MB, {time.monotonic() - start:.0f} s")
    return 1 if filled.failed else 0


if __name__ == "__main__":
    sys.exit(main())
