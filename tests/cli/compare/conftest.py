"""What the tests of `fastreg compare` share."""

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Threads that wait for each other cost seconds here where other tests run beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
