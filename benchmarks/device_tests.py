"""Runs the kernel tests on a GPU in several processes, the most important files first.

The pytest plugin `outcomes` writes the outcome of each test, and leaves out tests that passed in an earlier
run.
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
"""Environment variable with the name of the list of tests to leave out; all workers read the same list."""

ledger: Ledger | None = None
"""Receives the outcomes; `None` in a worker, which sends its outcomes to the first process."""


def run(into: Ledger, where: str, dry: bool) -> bool:
    """Runs the tests that have not passed yet; returns whether none has failed."""
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
    """Returns the numbers of tests that have passed, were skipped and have failed, by outcome."""
    outcomes = [row["outcome"] for row in rows.values()]
    return {outcome: outcomes.count(outcome) for outcome in ("passed", "skipped", "failed")}
