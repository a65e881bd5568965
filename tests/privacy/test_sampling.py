"""Poisson-sampled batches and their loader."""

import math

import pytest
import torch
from torch.utils.data import TensorDataset

from fastreg.privacy import PoissonSampler, poisson_loader

from .conftest import batch


def test_poisson_sampling():
    """Each sample by itself: sizes are binomial, batches may be empty, and all samples come as often."""
    sampler = PoissonSampler(50, 0.1, steps=4000, generator=torch.Generator().manual_seed(0))
    batches = list(sampler)
    sizes = torch.tensor([len(b) for b in batches], dtype=torch.float64)
    assert len(batches) == len(sampler) == 4000 and (sizes == 0).any()
    assert abs(sizes.mean() - 5) < 4 * math.sqrt(4.5 / 4000) and abs(sizes.var() - 4.5) < 0.5
    counts = torch.bincount(torch.tensor([i for b in batches for i in b]), minlength=50)
    assert ((counts - 400).abs() < 5 * math.sqrt(360)).all()


@pytest.mark.parametrize(
    "wrong", [{"steps": 2.5}, {"steps": True}, {"steps": -1}, {"samples": 2.5}, {"samples": 0}]
)
def test_numbers_of_samples_and_steps_are_whole(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name} must be a whole number >= ., got {name}={value}"):
        PoissonSampler(**{"samples": 10, "sample_rate": 0.5, **wrong})


def test_what_is_drawn_is_secret_by_default():
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        draws.append(list(PoissonSampler(100, 0.5, steps=1)))
    assert draws[0] != draws[1]


def test_poisson_loader():
    data = TensorDataset(*batch(20))
    loader = poisson_loader(data, 0.05, steps=60, generator=torch.Generator().manual_seed(0))
    batches = list(loader)
    assert len(batches) == len(loader) == 60 and any(b is None for b in batches)
    assert all(b is None or b[0].shape[1:] == (6,) for b in batches)
    assert len(poisson_loader(data, 0.05)) == 20
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match="sample_rate"):
            poisson_loader(data, wrong)
