"""Fills Triton's cache for a target, without a GPU: every kernel and chain as its launcher would compile it.

Nothing is compiled by hand: families of kernels are run on tiny CPU tensors with a driver that launches
nothing, so that specialisation, options and keys are those of a run on the target.
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
"""What kernels with a bias or a rate for each channel are compiled for by default."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = ("fp32", "bf16", "mixed", "remainder")
"""What is compiled by default: dtypes, and for chains combinations of weights, gradients and state."""


WIDE = ("dropout",)
"""Families that are compiled for a number of features."""


class Item(NamedTuple):
    """Something that is compiled in one go.

    Args:
        family: One of `families.FAMILIES`.
        kind: A dtype; for chains one of `chains.STORAGES`.
        nonfinite: For chains, what is done about NaN and infinities: with "skip" it is another kernel.
        features: Of the last dimension.
    """

    family: str
    kind: str
    nonfinite: str = "propagate"
    features: int = 16

    def __str__(self) -> str:
        parts = f"{self.family} {self.kind}", "skipping" * (self.nonfinite == "skip")
        return ", ".join(filter(None, (*parts, f"{self.features} features" * (self.family in WIDE))))


class Filled(NamedTuple):
    """What a cache holds after it was filled.

    Args:
        kernels: All that the items need.
        compiled: How many of these were not there before.
        seconds: How long it took.
        failed: Items that did not compile, with the errors.
    """

    kernels: int
    compiled: int
    seconds: float
    failed: dict[str, str]


def items(
    names: Sequence[str] = (), kinds: Sequence[str] = KINDS, features: Sequence[int] = FEATURES
) -> list[Item]:
    """The work: by default, all that is shipped."""
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
    """Gives zeros instead of uninitialized memory.

    No kernel runs here, so a flag that the host reads would be left over from earlier tensors. If it were not
    0, the step would count as skipped, and the kernels of the steps after it would not be compiled.
    """

    ZEROED = {torch.empty: torch.zeros, torch.empty_like: torch.zeros_like}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.ZEROED.get(func, func)(*args, **(kwargs or {}))


def run(item: Item) -> None:
    """Launch what an item needs, on tiny tensors."""
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
    """Compile into a cache.

    Args:
        target: Such as "sm_90".
        cache: The folder of the cache.
        work: What to compile.
        jobs: Processes.
        report: Called after each item with the number of kernels that it needs.
        driver: "stub"; or "recording", which also builds Triton's launchers, for the Python that runs this.
    """
    start = time.perf_counter()
    cache.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=cache).close()  # an error now rather than in every process
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
    """Remove what no run reads of these kernels, by their hashes: four fifths of a cache.

    Triton 3.9 takes a kernel for lost if a file of its group is, so the group no longer names it.
    """
    for folder in (folder for hash, folder in hashes(cache).items() if hash in made):
        for group in folder.glob("__grp__*.json"):
            members = json.loads(group.read_text())["child_paths"]
            kept = {name: path for name, path in members.items() if not name.endswith(".source")}
            document.write(group, {"child_paths": kept})
        for file in folder.glob("*.source"):
            file.unlink()


def _begin(target: str, cache: str, driver: str) -> None:
    """Make this process compile for a target, into a folder."""
    os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_STORE_BINARY_ONLY": "1"}
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
    from . import recording, stub

    made = recording.recording_driver(target) if driver == "recording" else stub.stub_driver(target)
    made.__enter__()
    _entered.append(made)


_entered: list[Any] = []  # until the process ends


def _run(item: Item) -> tuple[set[str], str]:
    """The hashes of the kernels that an item needs; and an error, if there was one."""
    from . import stub

    stub.forget_compiled()
    error = ""
    try:
        run(item)
    except Exception as caught:
        error = f"{type(caught).__name__}: {' '.join(str(caught).split())[:300]}"
    return {kernel.hash for kernel in stub.compiled()}, error


def hashes(cache: Path) -> dict[str, Path]:
    """Of the kernels that are in a cache, and the folder of each; damaged files count for nothing."""
    folders = {}
    for name in entry_points():
        for file in cache.glob(f"*/{name}.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                folders[json.loads(file.read_text())["hash"]] = file.parent
    return folders
