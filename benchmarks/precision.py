"""Measures how precise averages and perturbations of bfloat16 weights are, where each change is small.

python -m fastreg_benchmarks.precision --json benchmarks/results/precision.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

import fastreg
from fastreg.cli import document

UPDATES = 10_000
ELEMENTS, SCALE, RHO = 10_000_000, 0.02, 0.05


def averages() -> list[dict[str, Any]]:
    """Averages a weight after a jump from 1 to 2, in bfloat16, in float32 and by `fastreg.EMA`.

    Returns a row for each decay: the average after `UPDATES` updates in each way, and the exact one.
    """
    rows = []
    for decay in (0.999, 0.9999):
        row: dict[str, Any] = {"decay": decay, "updates": UPDATES, "exact": 2 - decay**UPDATES}
        for dtype in (torch.bfloat16, torch.float32):
            average, target = torch.ones(1, dtype=dtype), torch.full((1,), 2.0, dtype=dtype)
            for _ in range(UPDATES):
                average.lerp_(target, 1 - decay)
            row[str(dtype).removeprefix("torch.")] = average.item()
        weight = Parameter(torch.ones(1, dtype=torch.bfloat16))
        weight.grad = torch.zeros_like(weight)
        optimizer = fastreg.SGD([weight], lr=0.0, regularizers=[fastreg.EMA(decay)])
        optimizer.state[weight]["ema"] = torch.ones(1)
        with torch.no_grad():
            weight.fill_(2.0)
        for _ in range(UPDATES):
            optimizer.step()
        row["fastreg"] = optimizer.state[weight]["ema"].item()
        rows.append(row)
    return rows


def perturbations() -> list[dict[str, Any]]:
    """Measures the perturbation that SAM makes to bfloat16 weights, in units of rho.

    Returns a row for each rounding and bf16 mode: the part along the gradient, 1 without rounding, and the
    norm of the part across, 0 without rounding.
    """
    rows = []
    generator = torch.Generator().manual_seed(0)
    start = (SCALE * torch.randn(ELEMENTS, generator=generator)).bfloat16()
    gradient = torch.randn(ELEMENTS, generator=generator).bfloat16()
    direction = gradient.double() / gradient.double().norm()
    for rounding in ("nearest", "stochastic"):
        for bf16 in ("stochastic", "remainder"):
            weight = Parameter(start.clone())
            optimizer = fastreg.SAM([weight], fastreg.SGD, rho=RHO, rounding=rounding, lr=0.1, bf16=bf16)
            weight.grad = gradient
            optimizer.first_step()
            moved = weight.detach().double() - start.double()
            along = float(moved @ direction)
            across = float((moved - along * direction).norm())
            row = {"elements": ELEMENTS, "scale": SCALE, "rho": RHO, "rounding": rounding, "bf16": bf16}
            rows.append(row | {"along": along / RHO, "across": across / RHO})
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints all rows, and writes them to a file if one is named; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m fastreg_benchmarks.precision", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    figures = {"torch": torch.__version__, "averages": averages(), "perturbations": perturbations()}
    for row in figures["averages"] + figures["perturbations"]:
        print(
            "  ".join(
                f"{key} {value:.7g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.items()
            )
        )
    if options.json:
        document.write(options.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
