"""What operators over the elements of a tensor share: how they run, their seeds, and samples of `vmap`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..runtime import backend

CHUNK = 2**17
"""Elements the reference works on at a time: its integers stay in the cache, and what a call of torch costs
is spread over many (4 M elements take 48 ms, in chunks of 2¹⁵ 74)."""

Parts = Sequence[Tensor | None]
"""Runs of the tensors an operator was given; `None` for one that is not there."""


def run(
    given: Parts, dtype: torch.dtype, out: Tensor | None, plain: Callable[[Parts, int], Tensor],
    compiled: Callable[[], Callable[[], Tensor]], launch: Callable[[Tensor], None],
) -> Tensor:  # fmt: skip
    """The result of an operator, by the backend's way.

    Args:
        given: Tensors of the shape of the result, contiguous; the first is there.
        dtype: Of the result.
        out: Where it goes, contiguous; may be the first of those given.
        plain: The reference for flat runs of these that start at an element, a multiple of 8.
        compiled: Makes the compiled reference for all of them, whose result is flat.
        launch: Fills a tensor by the kernel.
    """
    x = given[0]
    assert x is not None
    name = backend.resolve(x.device, x.numel())
    if name == "compiled" and x.numel() > 1:
        try:
            fused = compiled()
        except Exception as error:
            backend.cannot_compile(error)
        else:
            result = fused().view(x.shape)
            return result if out is None else out.copy_(result)
    if out is None:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if name == "triton":
        launch(out)
        return out
    flat = [t if t is None else t.view(-1) for t in given]
    for first in range(0, x.numel(), CHUNK):
        parts = [t if t is None else t[first : first + CHUNK] for t in flat]
        out.view(-1)[first : first + CHUNK].copy_(plain(parts, first))
    return out


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator, on the device: int64, 0-d."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def known_seed(seed: Tensor) -> Tensor | int:
    """As an integer, with which the reference works faster, where nobody has to be waited for."""
    return int(seed) if seed.device.type == "cpu" else seed


def transformed() -> bool:
    """Whether `torch.func` is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def one_by_one(
    function: Any, info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[Tensor, int]:
    """`vmap` of an `autograd.Function`: each sample on its own."""
    given = [_each(*each, info.batch_size) for each in zip(inputs, in_dims, strict=True)]
    return torch.stack([function.apply(*own) for own in zip(*given, strict=True)]), 0


def _each(value: Any, dim: Any, count: int) -> Sequence[Any]:
    return value.unbind(dim) if isinstance(value, Tensor) and dim is not None else [value] * count
