"""A plugin of pytest: kernels are compiled as on a GPU and launched into nothing, to fill Triton's cache.

    TRITON_CACHE_DIR=... pytest -p fastreg_benchmarks.compile_only tests/kernels

Tests fail, because nothing is computed; what they would launch on `FASTREG_TARGET`, by default sm_90, is in
the cache afterwards.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

_entered: list[Any] = []


def pytest_configure(config: pytest.Config) -> None:
    """Launch into nothing, in this process and in those of workers."""
    os.environ |= {"TRITON_INTERPRET": "0", "TRITON_STORE_BINARY_ONLY": "1"}  # not by the tests' own choice
    from .recording import recording_driver

    driver = recording_driver(os.environ.get("FASTREG_TARGET", "sm_90"))
    driver.__enter__()
    _entered.append(driver)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Launch as before."""
    while _entered:
        _entered.pop().__exit__(None, None, None)
