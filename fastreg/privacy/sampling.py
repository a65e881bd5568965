"""Poisson sampling: every sample is in a batch with the same probability, whatever else is in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate


class PoissonSampler(Sampler[list[int]]):
    """A batch sampler that draws every sample by itself with the same probability; batches may be empty.

    What is drawn has to stay secret for accountants to count with it: by default it comes from a generator
    that the operating system seeds, not from torch's.

    Args:
        samples: How many samples there are; ≥ 1.
        sample_rate: The probability, in (0, 1].
        steps: How many batches; 1 / sample_rate by default, about a pass over the data.
        generator: Whence random numbers come, on the CPU.

    Raises:
        ValueError: For values out of range.
    """

    def __init__(
        self, samples: int, sample_rate: float, steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        if samples < 1:
            raise ValueError(f"samples must be >= 1, got {samples=}")
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate=}")
        self.samples, self.sample_rate = int(samples), float(sample_rate)
        self.steps = max(1, round(1 / sample_rate)) if steps is None else int(steps)
        self.generator = generator

    def __len__(self) -> int:
        """How many batches."""
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        """The indices of each batch."""
        generator = self.generator
        if generator is None:
            generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(8), "little", signed=True))
        for _ in range(self.steps):
            drawn = torch.rand(self.samples, generator=generator, dtype=torch.float64) < self.sample_rate
            yield drawn.nonzero().flatten().tolist()


def poisson_loader(
    dataset: Dataset[Any], sample_rate: float, steps: int | None = None, *,
    generator: torch.Generator | None = None, collate_fn: Callable[[list[Any]], Any] = default_collate,
    **kwargs: Any,
) -> DataLoader[Any]:  # fmt: skip
    """A `DataLoader` over Poisson-sampled batches, where an empty one is `None`: a step without gradients.

    Args:
        dataset: With a length.
        sample_rate: The probability with which a sample is in a batch, in (0, 1].
        steps: How many batches; 1 / sample_rate by default.
        generator: Whence random numbers come; seeded by the operating system by default.
        collate_fn: Makes a batch of samples.
        kwargs: For the `DataLoader`.

    Raises:
        ValueError: For values out of range.
    """
    sampler = PoissonSampler(len(dataset), sample_rate, steps, generator)  # type: ignore[arg-type]
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=_Collate(collate_fn), **kwargs)


class _Collate:
    """Of nothing, `None`."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        return self.collate(samples) if samples else None
