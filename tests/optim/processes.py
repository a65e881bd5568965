"""Runs a test module as several processes, which find each other through a folder."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

WORLD = 2
ROOT = Path(__file__).resolve().parents[2]


def run_processes(
    module: str, folder: Path, *arguments: str, timeout: float = 120, **environment: str
) -> None:
    """Runs `python -m module rank folder *arguments` for each rank, and shows what they print if one fails.

    Args:
        module: Such as `tests.optim.test_distributed`.
        folder: Where the processes write their logs and results.
        arguments: What else they get.
        timeout: Seconds for all of them.
        environment: Variables that they get besides.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment}
    logs = [folder / f"log.{rank}" for rank in range(WORLD)]
    with contextlib.ExitStack() as stack:
        processes = []
        for rank, log in enumerate(logs):
            file = stack.enter_context(log.open("wb"))
            command = [sys.executable, "-m", module, str(rank), str(folder), *arguments]
            process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
            )
            stack.callback(process.kill)
            processes.append(process)
        deadline = time.monotonic() + timeout
        while (codes := [process.poll() for process in processes]) != [0] * WORLD:
            if any(codes) or time.monotonic() > deadline:  # one failed: the other would wait for it
                break
            time.sleep(0.1)
    assert codes == [0] * WORLD, "\n".join(log.read_text() for log in logs)
