"""The loop of the elementwise kernels: wide tiles first, then narrow ones.

A program works on the elements from `start` to `stop` of a tensor.  Up to `wide`, a multiple of 16, it takes
whole tiles, whose mask is constant over 16 elements: that keeps accesses 128 bits wide, where a plain
`offsets < n` turns them all into scalar ones.  Narrow tiles do the rest, and all of a misaligned tensor, for
which `wide` is `start`.

A kernel hands over a device function and its arguments, in a tuple that is written in the call:

    for_each_tile(noise_block, (x, out, key), start, wide, stop, CHUNK, 16)

calls `noise_block(x, out, key, tile)` for each tile.  The function is compiled twice, wide and narrow; narrow
tiles are smaller, so that they take no registers from wide ones.  The kernels of the step and of norms have
loops of their own: with this one, Adam with amsgrad spills registers on sm_80.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """Contiguous elements that a program works on at a time."""

    first: Any  # int64, index of the first element
    offsets: Any  # int64 block, index of each
    inside: Any  # bool block, the mask of all accesses
    stop: Any  # elements from here on are outside
    WIDE: Any  # constexpr, whether accesses are 128 bits wide


@triton.jit
def for_each_tile(function, arguments, start, wide, stop, CHUNK: tl.constexpr, NARROW: tl.constexpr):
    # Tiles are made in the calls: in a local, or as the result of a function, WIDE would not be constant.
    for first in range(start, wide, CHUNK):
        offsets = first + tl.arange(0, CHUNK)
        function(*arguments, Tile(first, offsets, offsets < wide, wide, True))
    for first in range(wide, stop, NARROW):
        offsets = first + tl.arange(0, NARROW)
        function(*arguments, Tile(first, offsets, offsets < stop, stop, False))
