"""A pytest plugin for `device_tests`: leaves out tests that have passed, and records all outcomes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from . import device_tests


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests that passed in an earlier run."""
    passed = set(json.loads(Path(os.environ[device_tests.PASSED]).read_text()))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = [item for item in items if item.nodeid not in passed]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Adds the outcome of a test to the ledger: of its call, or of a setup or teardown that did not pass."""
    if device_tests.ledger is None or (
        report.when != "call" and report.outcome == "passed"
    ):  # in a worker, or without an outcome yet
        return
    row: dict[str, Any] = {"outcome": report.outcome, "seconds": report.duration}
    if report.failed:
        row |= {"failed": report.longreprtext.splitlines()[-1][:300], "trace": report.longreprtext[-4000:]}
    elif report.skipped and isinstance(report.longrepr, tuple):
        row["reason"] = report.longrepr[2]
    device_tests.ledger.add(report.nodeid, row)
