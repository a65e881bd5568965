"""Measures the time to compile a step on a CPU and all kernels for a GPU, and the time if they are cached.

python -m fastreg_benchmarks.cold_start --json benchmarks/results/cold_start.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastreg.cli import document

from . import measure, precompile

CHAIN, ELEMENTS = "clip+noise+AdamW+EMA", 2_000_000
STEP = f"""
import time, torch
from fastreg_benchmarks import chains
p = torch.nn.Parameter(torch.randn({ELEMENTS}))
p.grad = torch.randn({ELEMENTS})
step = chains.whole_step(chains.optimizer({CHAIN!r}, [p], lr=0.01, seed=0))
seconds = []
for _ in range(2):
    start = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - start)
print(*seconds)
"""
LATER = 3
"""Number of later processes, which load what the first one has compiled."""


def steps() -> dict[str, Any]:
    """Measures the seconds of the first compiled step in a process, when nothing is cached and later.

    Returns both, and the seconds of a second step; those of later processes are medians.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ, "FASTREG_BACKEND": "compiled",
            "FASTREG_CACHE_DIR": f"{folder}/fastreg", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        }  # fmt: skip
        seconds = []
        for _ in range(1 + LATER):
            command = [sys.executable, "-c", STEP]
            run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            seconds.append([float(number) for number in run.stdout.split()])
    first, *later = seconds
    return {
        "chain": CHAIN, "elements": ELEMENTS, "first_process": first[0],
        "later_process": statistics.median(row[0] for row in later),
        "warm_step": statistics.median(row[1] for row in later),
    }  # fmt: skip


def kernels(target: str = "sm_90") -> dict[str, Any]:
    """Measures the seconds and bytes of `fastreg precompile`, and its seconds when all kernels are cached."""
    with tempfile.TemporaryDirectory() as folder:
        work, jobs = precompile.items(), os.cpu_count() or 1
        first = precompile.fill(target, Path(folder), work, jobs)
        again = precompile.fill(target, Path(folder), work, jobs)
        size = sum(file.stat().st_size for file in Path(folder).glob("*/*"))
    return {
        "target": target, "kernels": first.kernels, "bytes": size, "processes": jobs,
        "seconds": first.seconds, "seconds_again": again.seconds, "compiled_again": again.compiled,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints all figures, and writes them to a file if one is named; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m fastreg_benchmarks.cold_start", description=__doc__)
    parser.add_argument("--json", type=Path, help="write it here")
    options = parser.parse_args(arguments)
    machine = measure.machine(torch.device("cpu"))
    figures = {"machine": machine, "compiled_step": steps(), "kernels": kernels()}
    print(figures["compiled_step"], figures["kernels"], sep="\n")
    if options.json:
        document.write(options.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
