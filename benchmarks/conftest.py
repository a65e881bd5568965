"""Adds the options `--quick` and `--device` to `pytest benchmarks`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastreg")
    group.addoption("--quick", action="store_true", help="smaller models and fewer rounds")
    group.addoption("--device", default="", help="such as cpu or cuda:1 (default: a GPU if there is one)")
