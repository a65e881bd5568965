"""Draws Poisson-sampled batches: each sample is in a batch with the same probability, independently."""

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ..common.validation import check_int, check_range


class PoissonSampler(Sampler[list[int]]):
    """A batch sampler that draws each sample with the same probability; batches may be empty.

    Accountants assume that the batches stay secret: by default they come from a generator that the operating
    system seeds, not from torch's.

    Args:
        samples: Number of samples in the data; ≥ 1.
        sample_rate: The probability, in (0, 1].
        steps: Number of batches, ≥ 0; 1 / sample_rate by default, about one pass over the data.
        generator: Generator of random numbers, on the CPU.

    Raises:
        ValueError: For values out of range, and for numbers that should be whole and are not.
    """

    def __init__(
        self, samples: int, sample_rate: float, steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        self.samples = check_int("samples", samples)
        self.sample_rate = check_range("sample_rate", sample_rate, 0, 1, above=True)
        self.steps = max(1, round(1 / sample_rate)) if steps is None else check_int("steps", steps, 0)
        self.generator = generator

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
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
    """Returns a `DataLoader` of Poisson-sampled batches, `None` for an empty one (a step without gradients).

    `collate_fn` makes a batch of samples, the dataset has a length, and `kwargs` are arguments of the
    `DataLoader`. All other arguments, and errors, are those of `PoissonSampler`.
    """
    sampler = PoissonSampler(len(dataset), sample_rate, steps, generator)  # type: ignore[arg-type]
    collate = functools.partial(_collated, collate_fn)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, **kwargs)


def _collated(collate_fn: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    """Returns a batch made of samples; `None` if there are none."""
    return collate_fn(samples) if samples else None
