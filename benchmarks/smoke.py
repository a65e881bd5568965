"""Compares every family of kernels with the reference on a GPU, on shapes of real models and on odd ones.

Each row has the largest error and its bound, or says how the family failed.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from fastreg.runtime import device, kernel_cache

from . import families, precompile, sanitize
from .families import Inputs, Shape
from .ledger import Ledger, Row, failed

REAL: dict[str, list[Shape]] = {
    "dropout": [(8, 1024, 768)],
    "noise": [(8, 1024, 768)],
    "adversarial": [(16, 3, 224 * 224)],
    "ghost": [(8, 1024, 768), (4, 512, 3072)],
    "private": [(1, 3072, 768), (1, 1, 768)],
}
"""Real shapes by family: activations of GPT-2, images, and weights with per-sample gradients."""
WEIGHTS: list[Shape] = [(1, 50257, 768), (1, 768, 2304), (1, 1, 2304), (1, 3072, 768), (1, 1, 768)]
"""Real shapes for the other families: some of GPT-2's weights, 43 M elements in all."""
TINY: list[Shape] = [(2, 3, 16)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(ledger: Ledger, where: str, dry: bool) -> bool:
    """Fills Triton's cache with missing kernels, then compares all families; returns whether all is right."""
    names = ["SGD-momentum", "dropout", "penalty"] if dry else list(families.FAMILIES)
    if not dry or os.environ.get("TRITON_CACHE_DIR"):
        row = ledger.attempt("kernels ahead of time", lambda: _filled(names, where, dry))
        print(f"kernels ahead of time: {row}", flush=True)
    cases = _cases(names, where, dry)
    for name in ledger.pending(cases):
        row = ledger.attempt(name, cases[name])
        outcome = row.get("failed") or row.get("wrong") or f"{row['error']:.1e} (<= {row['bound']:.1e})"
        print(f"{name}: {outcome}", flush=True)
    return not any(map(failed, ledger.rows.values()))


def _filled(names: list[str], where: str, dry: bool) -> Row:
    target = "sm_90" if dry else device.architecture(torch.device(where)).name
    kinds = ["fp32"] if dry else precompile.KINDS
    work = precompile.items(names[:1] if dry else (), kinds)
    filled = precompile.fill(target, kernel_cache.folder(), work, 1 if dry else os.cpu_count() or 1)
    row: Row = {"kernels": filled.kernels, "compiled": filled.compiled}
    return row | ({"failed": filled.failed} if filled.failed else {})


def _cases(names: list[str], where: str, dry: bool) -> dict[str, Callable[[], Row]]:
    cases: dict[str, Callable[[], Row]] = {}
    for name in names:
        for kind, dtype in DTYPES.items():
            real = TINY if dry else REAL.get(name, WEIGHTS)
            odd = TINY if dry else sanitize.SHAPES
            cases[f"{name} {kind}"] = _case(name, dtype, where, real, (0,))
            cases[f"{name} {kind}, odd"] = _case(name, dtype, where, odd, (1,) if dry else sanitize.OFFSETS)
    return cases


def _case(
    name: str, dtype: torch.dtype, where: str, shapes: list[Shape], offsets: tuple[int, ...]
) -> Callable[[], Row]:
    def compare() -> Row:
        actual, expected = (
            families.run(name, Inputs(dtype, where, backend, shapes, offsets))
            for backend in ("triton", "reference")
        )
        row: Row = {
            "error": families.error(actual, expected), "bound": families.bound(dtype, shapes, name)
        }  # fmt: skip
        return row if row["error"] <= row["bound"] else row | {"wrong": f"off by {row['error']:.1e}"}

    return compare
