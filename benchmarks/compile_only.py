"""Plugin of pytest that compiles the kernels of tests as on a GPU, without launching them.

    TRITON_CACHE_DIR=... pytest -p fastreg_benchmarks.compile_only tests/kernels

This fills Triton's cache with the kernels that the tests launch on `FASTREG_TARGET`, by default sm_90.  The
tests fail, because nothing is computed.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

_entered: list[Any] = []


def pytest_configure(config: pytest.Config) -> None:
    """Activates a driver that runs nothing, in this process or in a worker."""
    os.environ |= {"TRITON_INTERPRET": "0", "TRITON_STORE_BINARY_ONLY": "1"}  # `tests` would interpret them
    from .recording import recording_driver

    driver = recording_driver(os.environ.get("FASTREG_TARGET", "sm_90"))
    driver.__enter__()
    _entered.append(driver)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Deactivates the driver that runs nothing."""
    while _entered:
        _entered.pop().__exit__(None, None, None)
