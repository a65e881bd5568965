"""Models and data that attacks are tested on."""

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def one_thread():
    """Models so small are not worth more, which would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def x():
    return torch.rand(6, 3, 5, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def y():
    return torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture
def model():
    """With BatchNorm, dropout, and a part that is frozen in eval mode."""
    torch.manual_seed(3)
    made = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(80, 3),
    )  # fmt: skip
    made[1].eval()
    return made
