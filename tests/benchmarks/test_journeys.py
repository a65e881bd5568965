"""Limits how many files and functions a reader has to follow; lower a limit when a journey gets shorter."""

import os
import subprocess
import sys

import pytest

LIMITS = {  # files and functions of fastreg, where kernels are counted apart
    "step('triton')": (12, 60),
    "step('reference')": (19, 85),
    "dropout()": (6, 30),
    "trainer()": (35, 140),
}
CODE = """
from fastreg_benchmarks import journeys
journey = journeys.{call}
print(len(journey.files), len(journey.host))
"""


@pytest.mark.parametrize("call", LIMITS)
def test_journeys_stay_short(call):
    """In a process of its own, because kernels are interpreted."""
    if call == "trainer()":
        pytest.importorskip("transformers")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", CODE.format(call=call)]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    files, functions = map(int, printed.split()[-2:])
    assert 0 < files <= LIMITS[call][0] and 0 < functions <= LIMITS[call][1]
