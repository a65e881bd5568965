"""The plugin of pytest behind `device_tests`: leaves out what has passed, and writes every outcome down."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from . import device_tests


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has passed."""
    passed = set(json.loads(Path(os.environ[device_tests.PASSED]).read_text()))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = [item for item in items if item.nodeid not in passed]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write down what a test has come to: its call, or what kept it from that."""
    if device_tests.ledger is None or (
        report.when != "call" and report.outcome == "passed"
    ):  # a worker, or nothing yet
        return
    row: dict[str, Any] = {"outcome": report.outcome, "seconds": report.duration}
    if report.failed:
        row |= {"failed": report.longreprtext.splitlines()[-1][:300], "trace": report.longreprtext[-4000:]}
    elif report.skipped and isinstance(report.longrepr, tuple):
        row["reason"] = report.longrepr[2]
    device_tests.ledger.add(report.nodeid, row)
