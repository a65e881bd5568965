"""Two processes under `DistributedDataParallel` against one.

Run as a program, this file is one of the two processes.
"""

import importlib.util
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

TIMEOUT = 300
CASES: dict[str, dict[str, Any]] = {
    "averages": {"ema": 0.8, "clip": 0.1},
    "sam": {"sam": 0.3, "ema": 0.8, "clip": 0.1},
    "agreement": {"sam": 0.3, "r_drop": 1.0, "gradient_noise": 0.1},
    "attacks": {"sam": 0.3, "adversarial": {"epsilon": 0.1}, "weight_noise": 0.01},
}
ALONE = ("attacks",)
"""Made by gradients that are of one process until the last micro-batch: not what one process does."""
RESUMES = not version("transformers").startswith("5.17.")
"""Transformers 5.17 loads the optimizer of one of several processes onto `cpu:0`, which torch refuses."""


def work(runs: Any, tools: Any, recipe: dict[str, Any], batch_size: int) -> dict[str, Any]:
    arguments = {
        "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 2, "max_steps": 4,
        "save_strategy": "steps", "save_steps": 2, "seed": 3,
    }  # fmt: skip
    options = {"dropout": 0.0, "recipe": {"optimizer": {"eps": 1e-5}, **recipe}, "arguments": arguments}
    trainer = runs.train(**options)
    folder = f"{trainer.args.output_dir}/checkpoint-2"
    resumed = runs.train(**options, resume=folder) if RESUMES else trainer
    return {
        "weights": tools.weights(trainer.model), "resumed": tools.weights(resumed.model),
        "loss": tools.logged(trainer, "loss"), "grad_norm": tools.logged(trainer, "grad_norm"),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no processes")
def test_two_processes_train_as_one(runs, tools, tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [worker.communicate(timeout=TIMEOUT)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert not any(worker.returncode for worker in workers), "\n".join(outputs)
    for name, recipe in CASES.items():
        first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True)[name] for rank in range(2))
        assert tools.distance(first["weights"], second["weights"]) == 0
        for each in (first, second):
            assert tools.distance(each["resumed"], each["weights"]) == 0
        if name in ALONE:
            continue
        alone = work(runs, tools, recipe, 4)
        assert tools.distance(first["weights"], alone["weights"]) < 1e-4, name
        assert first["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert first["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)


def main(folder: Path) -> None:
    spec: Any = importlib.util.spec_from_file_location("shared", Path(__file__).with_name("conftest.py"))
    shared: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shared)
    import fastreg

    torch.set_num_threads(1)
    done = {}
    with fastreg.use_backend("reference"):
        for name, recipe in CASES.items():
            runs = shared.Runs(folder / name)
            done[name] = work(runs, shared.Tools, recipe, 2)
    torch.save(done, folder / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
