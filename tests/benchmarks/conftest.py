"""These tests compile kernels, and do not run in a process that interprets them."""

import os
from pathlib import Path

import pytest


class Interpreted(pytest.Module):
    """A module that is left out."""

    def collect(self):
        pytest.skip(
            "compiles kernels, which other tests of this run interpret: unset TRITON_INTERPRET and run "
            "`pytest tests/benchmarks`",
            allow_module_level=True,
        )


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Interpreted.from_parent(parent, path=module_path)
    return None
