"""What the tests of modules share."""

import pytest
import torch


@pytest.fixture
def x():
    return torch.randn(37, 11, generator=torch.Generator().manual_seed(0))
