"""Adds noise to sums of clipped gradients and passes the result to an optimizer (Gaussian mechanism)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..engine import layout
from .grad_sources import ClippedGradSource, Parameters
from .noise import InPlaceNoise, NoiseKey, PrivateNoise


class Mechanism:
    """Passes sums of clipped gradients to an optimizer, and never without noise; a `group` shares a batch."""

    def __init__(self, source: ClippedGradSource, noise: NoiseKey, group: Any) -> None:
        self.source, self.noise, self._group = source, noise, group
        self.component = PrivateNoise(noise)
        self._in_place = InPlaceNoise(self.component)
        self._written: dict[Tensor, Tensor] = {}
        self._grad_dtypes: dict[Tensor, torch.dtype | None] = {}
        self.share_key()

    @property
    def world(self) -> int:
        """Number of processes that share a batch."""
        available = torch.distributed.is_available() and torch.distributed.is_initialized()
        return torch.distributed.get_world_size(self._group) if available else 1

    def share_key(self) -> None:
        """Copies key and count of the first process to all others, so that they draw the same noise."""
        if self.world > 1:
            state = [(self.noise.key, self.noise.count)]
            torch.distributed.broadcast_object_list(state, group=self._group, group_src=0)
            self.noise.key, self.noise.count = state[0]

    def sums(self, parameters: Parameters) -> list[Tensor]:
        """Returns the sums of this process, not private yet; zeros for parameters without samples.

        Raises:
            RuntimeError: For samples that were clipped to another sensitivity than that of the noise.
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

    def all_reduce(self, sums: list[Tensor]) -> list[Tensor]:
        """Adds up the sums of all processes, possibly in place; DTensors hold the whole sum already."""
        if self.world == 1:
            return sums
        sums = [total if layout.is_dtensor(total) else total.contiguous() for total in sums]
        works = [
            torch.distributed.all_reduce(total, group=self._group, async_op=True)
            for total in sums
            if not layout.is_dtensor(total)
        ]
        for work in works:
            work.wait()
        return sums

    @contextlib.contextmanager
    def released(
        self, parameters: Parameters, sums: list[Tensor], std: float, share: float, streams: list[int] | None
    ) -> Iterator[dict[Tensor, Tensor] | None]:
        """Lets the optimizer step by noised sums in the block; the sums are discarded in any case.

        Args:
            parameters: The trainable parameters.
            sums: Sums over all processes; overwritten if there are `streams`.
            std: See `PrivateNoise.authorize_step`.
            share: See `PrivateNoise.authorize_step`.
            streams: Indices of the parameters in their optimizer, to write noised sums to `p.grad`; `None` if
                the optimizer has the component, which adds the noise.

        Yields:
            The sums by parameter, for `step(gradients=...)`; `None` if they are in `p.grad`.
        """
        try:
            with self.component.authorize_step(std, share, self.noise.advance()):
                if streams is None:
                    yield dict(zip(parameters, sums, strict=True))
                    return
                self._in_place.add_noise(sums, streams)
        finally:
            self.source.discard(parameters)
        self._written = dict(zip(parameters, map(self._write_grad, parameters, sums), strict=True))
        with self.component.authorize_step(0.0, 1.0, 0):  # these gradients have their noise
            yield None

    def _write_grad(self, p: Tensor, total: Tensor) -> Tensor:
        """Sets `p.grad` to a noised gradient in the dtype that optimizers expect."""
        if total.dtype != p.dtype:
            total, dtype = total.to(p.dtype), p.grad_dtype
            if dtype not in (None, p.dtype):
                self._grad_dtypes[p] = dtype
                p.grad_dtype = p.dtype
        p.grad = total
        return total

    def clear(self, parameters: Parameters, keep_sums: bool) -> None:
        """Clears gradients, and unless `keep_sums` also sums for a later step."""
        self.source.clear(parameters, keep_sums)
        while self._grad_dtypes:
            p, dtype = self._grad_dtypes.popitem()
            p.grad_dtype = dtype
        self._written = {}

    def check_cleared(self) -> None:
        """Refuses gradients written by an earlier step, to which a backward pass may have added.

        Raises:
            RuntimeError: If there are any.
        """
        if any(p.grad is written for p, written in self._written.items()):
            raise RuntimeError("p.grad still holds the latest step's: call zero_grad() after every step()")
