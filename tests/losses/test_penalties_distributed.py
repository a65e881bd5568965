"""Penalties of sharded weights: two processes against one.

Run as a program, this file is one of the two processes.
"""

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastreg

WORLD = 2
PENALTIES = (fastreg.l2_penalty, fastreg.l1_penalty)


def model():
    """Rows that do not split evenly, and fewer rows than ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))


def trained(net, penalty):
    """Value and gradients of a loss with a penalty, the same data on all ranks."""
    x = torch.ones(3, 4)
    value = penalty(net, 0.1)
    (net(x).square().mean() + value).backward()
    gradients = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in net.parameters()]
    return value.item(), [g.clone() for g in gradients]


def rank(number, folder):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, distribute_tensor

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=number, world_size=WORLD,
        timeout=datetime.timedelta(seconds=100),
    )  # fmt: skip
    mesh = torch.distributed.init_device_mesh("cpu", (WORLD,))
    results = []
    for penalty in PENALTIES:
        net = model()
        fully_shard(net[0], mesh=mesh)
        fully_shard(net, mesh=mesh)
        results.append(trained(net, penalty))
    whole = distribute_tensor(torch.arange(6.0), mesh)
    sums = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    try:
        fastreg.l2_penalty([sums])
        refused = ""
    except ValueError as error:
        refused = str(error)
    mixed = fastreg.l2_penalty([whole, torch.ones(2)]).item()
    torch.save((results, refused, mixed), f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(number), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(WORLD)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(Path(folder, f"{number}.pt")) for number in range(WORLD)]


def test_value_and_gradients_are_those_of_one_process(outcomes, close):
    for results, _, _ in outcomes:
        for (value, gradients), penalty in zip(results, PENALTIES, strict=True):
            expected, slopes = trained(model(), penalty)
            assert value == pytest.approx(expected, rel=1e-6)
            close(gradients, slopes)


def test_partial_sums_are_refused_and_whole_tensors_taken_along(outcomes):
    for _, refused, mixed in outcomes:
        assert "redistribute" in refused
        assert mixed == pytest.approx(55 + 2, rel=1e-6)


if __name__ == "__main__":
    rank(int(sys.argv[1]), sys.argv[2])
