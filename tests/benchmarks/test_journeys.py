"""Limits how many files and functions a reader has to follow; lower a limit when a journey gets shorter."""

import os
import subprocess
import sys

import pytest

LIMITS = {  # files and functions of fastreg, where kernels are counted apart, and record types
    "step('triton')": (12, 60, 8),
    "step('reference')": (18, 80, 10),
    "dropout()": (6, 30, 8),
    "trainer()": (35, 140, 20),
}
CODE = """
from fastreg_benchmarks import journeys
journey = journeys.{call}
print(len(journey.files), len(journey.host), len(journey.records))
"""


@pytest.mark.parametrize("call", LIMITS)
def test_journeys_stay_short(call):
    """In a process of its own, because kernels are interpreted."""
    if call == "trainer()":
        pytest.importorskip("transformers")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", CODE.format(call=call)]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    counts = list(map(int, printed.split()[-3:]))
    assert all(0 < count <= most for count, most in zip(counts, LIMITS[call], strict=True)), counts
