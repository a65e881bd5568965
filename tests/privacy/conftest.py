"""Helpers of the privacy tests: a small private training run, and clipped sums one sample at a time."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastreg
from fastreg.privacy import DPOptimizer


@pytest.fixture(autouse=True)
def flags_may_be_set() -> Iterator[None]:
    """Opacus sets those of cudnn, which torch's own tests, imported by others here, forbid to the process."""
    with getattr(torch.backends, "__allow_nonbracketed_mutation")():
        yield


class OneByOne:
    """Ordinary gradients of each sample, in double, clipped and summed.

    Args:
        model: Not attached to anything.
        loss: Of a model and some samples: their mean.
        batch: Tensors with samples first.
        bound: C, or a bound for each parameter by name.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], batch: Any, bound: Any = 1.0) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named}
        self.sizes = {name: 0.0 for name, _ in named}  # of what is summed
        self.norms = []
        for i in range(len(batch[0])):
            model.zero_grad()
            loss(model, *(t[i : i + 1] for t in batch)).backward()
            grads = {name: p.grad.double() for name, p in named if p.grad is not None}
            norm = torch.stack([g.norm() for g in grads.values()]).norm()
            self.norms.append(norm)
            for name, g in grads.items():
                c, n = (bound, norm) if not isinstance(bound, dict) else (bound[name], g.norm())
                clipped = g * min(1.0, c / float(n)) if n else g
                self.sums[name] += clipped
                self.sizes[name] += float(clipped.abs().amax())
        self.total = sum(self.sizes.values())
        model.zero_grad()

    def check(self, model: nn.Module, norms: Tensor | None, tolerance: float = 1e-5) -> None:
        """The gradients of a model are these, relative to what is summed for each parameter."""
        for name, p in model.named_parameters():
            if name in self.sums:
                off = float((p.grad.double() - self.sums[name]).abs().amax())
                # What cancels within a sample, such as biases of keys, is known to float32 of the whole.
                floor = 1e-8 * self.total
                assert off <= tolerance * self.sizes[name] + floor, f"{name}: {off} of {self.sizes[name]}"
        if norms is not None:
            assert torch.allclose(norms, torch.stack(self.norms).to(norms), rtol=2e-6, atol=0)


@pytest.fixture(name="OneByOne")
def one_by_one() -> type[OneByOne]:
    return OneByOne


def network(dtype=torch.float32):
    """Returns a small network, the same at every call."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(samples=8, dtype=torch.float32):
    """Returns inputs and labels, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 6, generator=generator).to(dtype)
    return x, torch.randint(0, 3, (samples,), generator=generator)


def private(model=None, make=fastreg.AdamW, lr=1e-2, **options):
    """Returns a model and a private optimizer around `make(parameters, lr=lr)`."""
    model = network() if model is None else model
    settings = {"model": model, "noise_multiplier": 1.0, "expected_batch_size": 8, "noise_seed": 3}
    return model, DPOptimizer(make(model.parameters(), lr=lr), **{**settings, **options})


def backward(model, samples=8, reduction="mean", rows=slice(None)):
    """Takes a backward pass on some rows of the batch."""
    x, y = batch(samples)
    nn.functional.cross_entropy(model(x[rows]), y[rows], reduction=reduction).backward()


def train(model, optimizer, steps=3):
    """Takes steps on the whole batch and returns the weights."""
    for _ in range(steps):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def weights(model):
    """Returns copies of the parameters."""
    return [p.detach().clone() for p in model.parameters()]
