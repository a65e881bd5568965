"""Fills Triton's cache with the kernels for a target, without a GPU.

Families of kernels run on tiny CPU tensors, with a driver that compiles but launches nothing.  So Triton's
specialisation, options and cache keys are the same as in a run on the target.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from fastreg.cli import document
from fastreg.runtime import kernel_cache

from . import chains, families
from .entry_points import entry_points

FEATURES = (768, 1024, 4096)
"""Numbers of features for which the `WIDE` families are compiled by default."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = ("fp32", "bf16", "mixed", "remainder")
"""Kinds that are compiled by default: for chains names of `chains.STORAGES`, for others of `DTYPES`."""


WIDE = ("dropout",)
"""Families with a bias or rates by channel: their kernels are compiled for each number of features."""


class Item(NamedTuple):
    """A family of kernels to compile, for one kind of dtypes.

    Args:
        family: One of `families.FAMILIES`, or another chain.
        kind: One of `DTYPES`; for chains one of `chains.STORAGES`.
        nonfinite: For chains, how NaN and infinities are treated: "skip" needs other kernels.
        features: Length of the last dimension.
    """

    family: str
    kind: str
    nonfinite: str = "propagate"
    features: int = 16

    def __str__(self) -> str:
        parts = f"{self.family} {self.kind}", "skipping" * (self.nonfinite == "skip")
        return ", ".join(filter(None, (*parts, f"{self.features} features" * (self.family in WIDE))))


class Filled(NamedTuple):
    """Result of filling a cache: the numbers of its kernels, the time and the errors.

    Args:
        kernels: Number of kernels that the items need.
        compiled: How many of these were not in the cache before.
        seconds: Wall time.
        failed: Errors by the name of the item that did not compile.
    """

    kernels: int
    compiled: int
    seconds: float
    failed: dict[str, str]


def items(
    names: Sequence[str] = (), kinds: Sequence[str] = KINDS, features: Sequence[int] = FEATURES
) -> list[Item]:
    """Returns the items to compile, by default for all shipped families and chains."""
    made = []
    for name in names or families.FAMILIES:
        if chains.known(name):
            storages = [kind for kind in kinds if kind in chains.STORAGES]
            made += [Item(name, *rest) for rest in itertools.product(storages, ("propagate", "skip"))]
        else:
            dtypes = [kind for kind in kinds if kind in DTYPES]
            widths = features if name in WIDE else (Item._field_defaults["features"],)
            made += [Item(name, kind, features=width) for kind in dtypes for width in widths]
    return made


class ZeroedMemory(TorchFunctionMode):
    """Mode in which `torch.empty` and `torch.empty_like` return zeros.

    No kernel writes results here, so the host would read flags from uninitialized memory.  If a flag were not
    0, the step would count as skipped, and kernels of later steps would not be compiled.
    """

    ZEROED = {torch.empty: torch.zeros, torch.empty_like: torch.zeros_like}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.ZEROED.get(func, func)(*args, **(kwargs or {}))


def run(item: Item) -> None:
    """Runs an item on tiny tensors, which launches all kernels that it needs."""
    dtype = DTYPES.get(item.kind, torch.bfloat16)
    chain = chains.known(item.family)
    shapes = [(3, 5, item.features)]
    inputs = families.Inputs(dtype, "cpu", "triton", shapes, storage=item.kind if chain else None)
    with ZeroedMemory():
        if chain:
            families.stepped(item.family, inputs, item.nonfinite)
        else:
            families.run(item.family, inputs)


def fill(
    target: str, cache: Path, work: Sequence[Item], jobs: int = 1,
    report: Callable[[Item, int], None] = lambda item, kernels: None, driver: str = "stub",
) -> Filled:  # fmt: skip
    """Compiles items in several processes, into a cache of Triton.

    Args:
        target: Such as "sm_90".
        cache: The folder of the cache.
        work: The items to compile.
        jobs: Number of processes.
        report: Called after each item, with the item and the number of kernels that it needs.
        driver: "stub", or "recording", which also builds Triton's launchers, for the running Python.
    """
    start = time.perf_counter()
    cache.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=cache).close()  # if it fails, it does so once and not in every process
    before, failed = hashes(cache).keys(), {}
    needed: set[str] = set()
    with ProcessPoolExecutor(
        max(1, min(jobs, len(work))),
        multiprocessing.get_context("spawn"),
        _begin,
        (target, str(cache), driver),
    ) as pool:
        try:
            for item, (used, error) in zip(work, pool.map(_run, work), strict=True):
                needed |= used
                if error:
                    failed[str(item)] = error
                report(item, len(used))
        except BrokenProcessPool:
            failed[target] = "a process died of the compiler, which may not know this target"
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    strip(cache, needed - before)
    if not failed:
        kernel_cache.add(cache, target, needed)
    return Filled(len(needed), len(needed - before), time.perf_counter() - start, failed)


def strip(cache: Path, made: set[str]) -> None:
    """Removes the Triton source of kernels, which no run reads: four fifths of a cache.

    Triton 3.9 ignores a kernel if a file of its group is missing, so the file is taken out of the group.

    Args:
        cache: The folder of the cache.
        made: Hashes of the kernels.
    """
    for folder in (folder for hash, folder in hashes(cache).items() if hash in made):
        for group in folder.glob("__grp__*.json"):
            members = json.loads(group.read_text())["child_paths"]
            kept = {name: path for name, path in members.items() if not name.endswith(".source")}
            document.write(group, {"child_paths": kept})
        for file in folder.glob("*.source"):
            file.unlink()


def _begin(target: str, cache: str, driver: str) -> None:
    """Makes this process compile for a target, into a folder."""
    os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_STORE_BINARY_ONLY": "1"}
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
    from . import recording, stub

    made = recording.recording_driver(target) if driver == "recording" else stub.stub_driver(target)
    made.__enter__()
    _entered.append(made)


_entered: list[Any] = []  # drivers, which stay active until the process ends


def _run(item: Item) -> tuple[set[str], str]:
    """Returns the hashes of the kernels that an item needs, and its error or an empty string."""
    from . import stub

    stub.forget_compiled()
    error = ""
    try:
        run(item)
    except Exception as caught:
        error = f"{type(caught).__name__}: {' '.join(str(caught).split())[:300]}"
    return {kernel.hash for kernel in stub.compiled()}, error


def hashes(cache: Path) -> dict[str, Path]:
    """Returns the folder of each kernel in a cache by its hash, without kernels whose files are damaged."""
    folders = {}
    for name in entry_points():
        for file in cache.glob(f"*/{name}.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                folders[json.loads(file.read_text())["hash"]] = file.parent
    return folders
