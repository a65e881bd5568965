"""Fixtures of the tests of modules."""

import pytest
import torch

import fastreg


@pytest.fixture
def x():
    return torch.randn(37, 11, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def reference():
    """Compiling takes seconds; `tests/kernels` compares the backends."""
    with fastreg.use_backend("reference"):
        yield


@pytest.fixture
def counting():
    """The graphs that a compiler was given so far, and the compiler."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph

    return graphs, compiler


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(params=["DistributedDataParallel", "compiled", "both"])
def wrap(request, process_group):
    """Wraps a model as training scripts do."""

    def wrap(model):
        if request.param != "compiled":
            model = torch.nn.parallel.DistributedDataParallel(model)
        return model if request.param == "DistributedDataParallel" else torch.compile(model, backend="eager")

    return wrap
