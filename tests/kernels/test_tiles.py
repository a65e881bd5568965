"""The loop over tiles visits each element once, with wide tiles only where all accesses may be wide."""

import os

import pytest
import torch
import triton
import triton.language as tl

from fastreg_kernels.tiles import for_each_tile

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
CHUNK, NARROW = 64, 16


@triton.jit
def count_block(visits, widths, tile):
    tl.store(visits + tile.offsets, tl.load(visits + tile.offsets, mask=tile.inside) + 1, mask=tile.inside)
    tl.store(widths + tile.offsets, tl.where(tile.WIDE, 2, 1), mask=tile.inside)


@triton.jit
def count_kernel(visits, widths, start, wide, stop, CHUNK: tl.constexpr, NARROW: tl.constexpr):
    for_each_tile(count_block, (visits, widths), start, wide, stop, CHUNK, NARROW)


@pytest.mark.parametrize(
    "start, wide, stop",
    [(0, 0, 1), (0, 16, 16), (0, 64, 64), (0, 160, 171), (0, 0, 40), (128, 208, 211), (128, 128, 133)],
)
def test_each_element_is_visited_once(start, wide, stop):
    visits, widths = (torch.zeros(256, dtype=torch.int32, device=DEVICE) for _ in range(2))
    count_kernel[(1,)](visits, widths, start, wide, stop, CHUNK=CHUNK, NARROW=NARROW)
    index = torch.arange(256, device=DEVICE)
    inside = (index >= start) & (index < stop)
    assert torch.equal(visits, inside.int())
    assert torch.equal(widths, inside.int() + (inside & (index < wide)).int())
