"""DPOptimizer in two processes that share a batch: run as a program, this file is one of them."""

import datetime
import os
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import fastreg
from fastreg.privacy import DPOptimizer

from ..optim.processes import WORLD, run_processes
from .conftest import backward, private, weights

pytestmark = pytest.mark.filterwarnings("ignore:noise_seed")

ROWS = [(6, 4), (5, 3), (1, 7), (13,), (37, 131)]


def noise_of(shard):
    """Two steps of noise on tensors that `shard` may shard."""
    params = [nn.Parameter(shard(torch.zeros(shape))) for shape in ROWS]
    for p in params:
        p.grad_sample = None
    optimizer = DPOptimizer(fastreg.SGD(params, lr=1.0), loss_reduction="sum", noise_seed=3)
    for _ in range(2):
        optimizer.step()
    return [p.detach() for p in params]


def shared(rank, world):
    """A batch in parts, one for each process, with a key that they agree on."""
    model, optimizer = private(noise_seed=None, noise_multiplier=0.0)
    for _ in range(3):
        backward(model, rows=slice(rank, None, world))
        optimizer.step()
        optimizer.zero_grad()
    mean = weights(model)
    optimizer.noise_multiplier = 1.0
    if rank == 0:  # the other has an empty batch
        backward(model)
    optimizer.step()
    return {"mean": mean, "noised": weights(model), "key": optimizer._mechanism.noise.key}


def process(rank, folder):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    warnings.simplefilter("ignore")
    store = dist.FileStore(str(Path(folder) / "store"), WORLD)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=90)
    )
    mesh = init_device_mesh("cpu", (WORLD,))
    shards = noise_of(lambda t: distribute_tensor(t, mesh, [Shard(0)]))
    out = {"noise": [t.full_tensor() for t in shards], **shared(rank, WORLD)}
    torch.save(out, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    run_processes("tests.privacy.test_processes", folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_noise_of_shards_is_that_of_the_whole(processes):
    expected = noise_of(lambda t: t)
    for result in processes:
        assert all(map(torch.equal, result["noise"], expected))


def test_processes_share_a_batch(processes, close):
    """Sums over processes, one noise, and weights that stay the same everywhere."""
    model, optimizer = private(noise_multiplier=0.0)
    expected = []
    for _ in range(3):
        for part in (0, 1):
            backward(model, rows=slice(part, None, 2))
        optimizer.step()
        optimizer.zero_grad()
    expected = weights(model)
    first, second = processes
    assert first["key"] == second["key"]
    for result in processes:
        close(result["mean"], expected)
    assert all(map(torch.equal, first["noised"], second["noised"]))
    assert not torch.equal(first["noised"][0], first["mean"][0])


if __name__ == "__main__":
    try:
        process(int(sys.argv[1]), sys.argv[2])
    except BaseException:
        traceback.print_exc()
        os._exit(1)
