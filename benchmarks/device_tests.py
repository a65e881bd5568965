"""The kernel tests on a GPU by many workers, the most important files first, each outcome written down.

What has passed in an earlier run is not run again (`outcomes` is the plugin of pytest that sees to both).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from .ledger import Ledger, Row, failed, settled

ROOT = Path(__file__).resolve().parents[1]
FILES = (
    "tests/optim/test_gpu.py", "tests/test_gpu.py", "tests/kernels/test_rules.py",
    "tests/kernels/test_norm.py", "tests/kernels/test_regularizers.py", "tests/kernels/test_step.py",
    "tests/kernels/test_storage.py", "tests/kernels/test_random.py", "tests/privacy/test_clip_and_sum.py",
    "tests/kernels/test_ghost.py", "tests/kernels/test_penalty.py", "tests/kernels/test_units.py",
    "tests/kernels/test_ascent.py", "tests/kernels/test_dropout.py", "tests/kernels/test_noise.py",
    "tests/kernels/test_adversarial.py", "tests/ops/test_dropout.py", "tests/ops/test_noise.py",
    "tests/nn/test_dropout.py", "tests/nn/test_fused.py", "tests/nn/test_noise.py",
    "tests/nn/test_attached.py", "tests/nn/test_noise_scheduler.py", "tests/nn/test_token_noise.py",
    "tests/common/test_random.py",
)  # fmt: skip
DRY = ("tests/optim/test_gpu.py", "tests/kernels/test_norm.py", "tests/nn/test_drop_path.py")
PASSED = "FASTREG_PASSED"
"""Names the file of what has passed before, which is the same for all workers from start to end."""

ledger: Ledger | None = None
"""Where outcomes go; `None` in a worker, whose outcomes the first process gets."""


def run(into: Ledger, where: str, dry: bool) -> bool:
    """Run the tests; whether all have passed."""
    global ledger
    ledger = into
    passed = [name for name, row in into.rows.items() if settled(row)]
    before = into.path.with_name(f".{into.path.name}.passed")
    before.write_text(json.dumps(passed))
    os.environ |= {"FASTREG_TEST_DEVICE": "cpu" if dry else where, PASSED: str(before)}
    workers = 1 if dry else min(16, os.cpu_count() or 1)
    try:
        files = [str(ROOT / file) for file in (DRY if dry else FILES)]
        plugins = ["-p", "fastreg_benchmarks.outcomes", "-p", "no:cacheprovider"]
        status = pytest.main(["-q", "--rootdir", str(ROOT), *plugins, "-n", str(workers), *files])
    finally:
        before.unlink()
    finished = pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED
    if status not in finished:
        raise RuntimeError(f"pytest ended with status {status}")
    return not any(map(failed, into.rows.values()))


def counts(rows: dict[str, Row]) -> dict[str, int]:
    """How many tests have passed, been skipped and failed."""
    outcomes = [row["outcome"] for row in rows.values()]
    return {outcome: outcomes.count(outcome) for outcome in ("passed", "skipped", "failed")}
