"""Models and data that the tests of training share."""

import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset


@functools.cache
def load_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))


@pytest.fixture
def digits():
    """Images of digits and their labels."""
    return load_digits()


@pytest.fixture
def loader():
    """Makes a DataLoader of digits."""

    def make(size=64, count=512, **options):
        return DataLoader(Subset(load_digits(), range(count)), batch_size=size, **options)

    return make


@pytest.fixture
def mlp():
    """Makes a small network for digits, always with the same weights."""

    def make(dropout=0.0):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 10))

    return make


@pytest.fixture
def gpt2():
    """Makes a GPT-2 of three layers, always with the same weights."""
    transformers = pytest.importorskip("transformers")

    def make(**rates):
        torch.manual_seed(0)
        rates = rates or dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=40, n_positions=16, n_embd=16, n_layer=3, n_head=2, bos_token_id=0,
                eos_token_id=0, **rates,
            )
        )  # fmt: skip

    return make


@pytest.fixture
def language():
    """Makes batches of random tokens."""

    def make(count=6, padded=False):
        generator = torch.Generator().manual_seed(1)
        batches = []
        for _ in range(count):
            ids = torch.randint(40, (4, 8), generator=generator)
            batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
            if padded:
                batches[-1]["attention_mask"][:, 6:] = 0
        return batches

    return make


class OneWeight(nn.Module):
    """One weight, and labels that it takes itself, as Hugging Face's models do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x, labels=None):
        y = self.weight * x
        return {"logits": y, "loss": None if labels is None else F.mse_loss(y, labels)}


@pytest.fixture
def Tiny():  # noqa: N802
    """The class of a model with one weight."""
    return OneWeight
