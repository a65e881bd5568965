"""Fixtures of the tests of modules."""

import pytest
import torch

from ..ops.conftest import counting, reference, x

__all__ = ["counting", "reference", "x"]


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
