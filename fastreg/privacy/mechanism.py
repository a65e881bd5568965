"""The Gaussian mechanism of a step: sums of clipped gradients come out with noise, or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .noise import Noise, Noising, PrivateNoise
from .sources import Parameters, Source, reduced


class Mechanism:
    """Hands sums of clipped gradients to an optimizer, with their noise.

    Args:
        source: Where the sums come from.
        noise: Key and count of the noise.
        group: The processes that share a batch.
    """

    def __init__(self, source: Source, noise: Noise, group: Any) -> None:
        self.source, self.noise, self._group = source, noise, group
        self.component = PrivateNoise(noise)
        self._noising = Noising(self.component)
        self._shown: dict[Tensor, Tensor] = {}
        self._grad_dtypes: dict[Tensor, torch.dtype | None] = {}
        self.share_key()

    @property
    def world(self) -> int:
        """How many processes share a batch."""
        available = torch.distributed.is_available() and torch.distributed.is_initialized()
        return torch.distributed.get_world_size(self._group) if available else 1

    def share_key(self) -> None:
        """All processes draw the noise of the first."""
        if self.world > 1:
            state = [(self.noise.key, self.noise.count)]
            torch.distributed.broadcast_object_list(state, group=self._group, group_src=0)
            self.noise.key, self.noise.count = state[0]

    def sums(self, parameters: Parameters) -> list[Tensor]:
        """Of the samples of this process, not private yet; zeros where none contributes.

        Args:
            parameters: Of what.

        Raises:
            RuntimeError: For sums of samples that were clipped to something else than the noise is for.
        """
        if other := self.source.clipped_to - {float(self.source.sensitivity)}:
            raise RuntimeError(
                f"samples were clipped to {max(other):g} before max_grad_norm was changed to a sensitivity "
                f"of {float(self.source.sensitivity):g}: change it after step() and before backward passes"
            )
        return [
            torch.zeros_like(p, memory_format=torch.preserve_format) if total is None else total
            for p, total in zip(parameters, self.source.take(parameters), strict=True)
        ]

    def reduced(self, sums: list[Tensor]) -> list[Tensor]:
        """Of the samples of all processes.

        Args:
            sums: As `sums` gives them; may be overwritten.
        """
        return reduced(sums, self._group) if self.world > 1 else sums

    @contextlib.contextmanager
    def fused(
        self, parameters: Parameters, sums: list[Tensor], std: float, share: float
    ) -> Iterator[dict[Tensor, Tensor]]:
        """Within the block a step by the sums adds the noise, which is nowhere in memory.

        Args:
            parameters: Of what.
            sums: As `sums` gives them; used up afterwards, whatever happens.
            std: Standard deviation of the noise.
            share: What noised sums are multiplied by.

        Yields:
            The sums by parameter.
        """
        try:
            with self.component.armed(std, share, self.noise.advance()):
                yield dict(zip(parameters, sums, strict=True))
        finally:
            self.source.used(parameters)

    @contextlib.contextmanager
    def written(
        self, places: list[int], parameters: Parameters, sums: list[Tensor], std: float, share: float
    ) -> Iterator[None]:
        """Within the block `p.grad` holds the noised sums, and stays until `forget`.

        Args:
            places: Of the parameters in their optimizer.
            parameters: Of what.
            sums: As `sums` gives them; overwritten.
            std: Standard deviation of the noise.
            share: What noised sums are multiplied by.
        """
        try:
            with self.component.armed(std, share, self.noise.advance()):
                self._noising.over(sums, places)
        finally:
            self.source.used(parameters)
        self._shown = dict(zip(parameters, map(self._show, parameters, sums), strict=True))
        with self.component.armed(0.0, 1.0, 0):  # what there is has its noise
            yield

    def _show(self, p: Tensor, total: Tensor) -> Tensor:
        """Put a noised gradient where optimizers look for it, in the dtype that they expect."""
        if total.dtype != p.dtype:
            total, dtype = total.to(p.dtype), p.grad_dtype
            if dtype not in (None, p.dtype):
                self._grad_dtypes[p] = dtype
                p.grad_dtype = p.dtype
        p.grad = total
        return total

    def forget(self, parameters: Parameters, kept: bool) -> None:
        """Clear gradients.

        Args:
            parameters: Of what.
            kept: Whether sums are kept for a later step.
        """
        self.source.clear(parameters, kept)
        while self._grad_dtypes:
            p, dtype = self._grad_dtypes.popitem()
            p.grad_dtype = dtype
        self._shown = {}

    def check_forgotten(self) -> None:
        """Refuse gradients that an earlier step has written, and a backward pass may have added to.

        Raises:
            RuntimeError: If there are any.
        """
        if any(p.grad is shown for p, shown in self._shown.items()):
            raise RuntimeError("p.grad still holds the latest step's: call zero_grad() after every step()")
