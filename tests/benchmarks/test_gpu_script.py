"""`benchmarks/gpu.sh`, as far as it goes without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def script(*arguments, out, **environment):
    settings = os.environ | {"OUT": str(out), "PYTHON": sys.executable} | environment
    settings.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", *arguments],
        env=settings,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
def test_dry_run(tmp_path):
    run = script("--dry", out=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"bench.json", "bench.png", "log.txt", "README.md"}
    log = (tmp_path / "log.txt").read_text()
    assert all(
        f"== {name}: exit status 0" in log for name in ("benchmarks", "tests", "memcheck", "racecheck")
    )


@pytest.mark.slow
def test_it_carries_on_after_a_failure_and_says_what_failed(tmp_path):
    """No matplotlib, no picture: the suites fail, and all that follows runs."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "matplotlib.py").write_text("raise ImportError('broken')\n")
    run = script("--dry", out=tmp_path / "out", PYTHONPATH=str(broken))
    assert run.returncode == 1
    assert "FAILED: benchmarks" in run.stdout and "FAILED: tests" not in run.stdout
    assert "== racecheck: exit status 0" in (tmp_path / "out" / "log.txt").read_text()


def test_a_wrong_argument(tmp_path):
    run = script("--wet", out=tmp_path)
    assert run.returncode == 2 and "--wet" in run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run everything")
def test_without_a_gpu_it_says_so(tmp_path):
    run = script(out=tmp_path)
    assert run.returncode == 2 and "--dry" in run.stderr
