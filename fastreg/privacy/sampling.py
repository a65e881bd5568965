"""Draws Poisson-sampled batches: each sample is in a batch with the same probability, independently."""

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

    Args:
        dataset: A dataset with a length.
        sample_rate: See `PoissonSampler`.
        steps: See `PoissonSampler`.
        generator: See `PoissonSampler`.
        collate_fn: Makes a batch of samples.
        kwargs: Arguments of the `DataLoader`.

    Raises:
        ValueError: For values out of range, and for numbers that should be whole and are not.
    """
    sampler = PoissonSampler(len(dataset), sample_rate, steps, generator)  # type: ignore[arg-type]
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=_Collate(collate_fn), **kwargs)


class _Collate:
    """Collates samples to a batch, and no sample to `None`."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        return self.collate(samples) if samples else None
