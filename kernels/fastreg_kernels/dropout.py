"""Computes dropout, and what is fused around it, in one pass: residual + dropout(activation(x + bias)).

The mask is a function of (seed, element index): the backward pass computes it again, and nothing is stored.
A call of Philox serves 8 elements, 16 bits each, which costs 14 instructions per bf16 element on sm_90;
`tl.rand` costs 61.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .activations import activate, backpropagate
from .random import PhiloxPosition, reaches16
from .tiles import for_each_tile


class Mask(NamedTuple):
    """The arguments of the mask; those of a single threshold are meaningless if each channel has its own."""

    key: Any
    thresholds: Any  # address
    threshold: Any  # of all elements
    scale: Any  # of all elements
    alive: Any  # whether any element is kept
    inner: Any  # elements that follow each other in a channel


@triton.jit
def scale_of(threshold, COMPUTE: tl.constexpr):
    share = tl.maximum(65536 - threshold, 1)  # 0: dropped anyway
    if COMPUTE == tl.float64:
        return 65536.0 / share.to(tl.float64)
    else:
        return tl.div_rn(65536.0, share.to(tl.float32))


@triton.jit
def load_mask(seed, thresholds, inner, CHANNELS: tl.constexpr, COMPUTE: tl.constexpr):
    threshold = tl.load(thresholds)
    if CHANNELS:
        alive = True
    else:
        alive = threshold < 65536
    return Mask(tl.load(seed), thresholds, threshold, scale_of(threshold, COMPUTE), alive, inner)


@triton.jit
def positions_in_period(base, start, tile, like, INDEX: tl.constexpr):
    """Positions of the elements of a tile behind the start of a period; 64 bits only once."""
    return base.to(INDEX) + (tile.first - start).to(INDEX) + tl.arange(0, like.shape[0])


@triton.jit
def drop(y, mask, start, tile, CHANNELS: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr):
    if CHANNELS:
        base = start % (mask.inner * CHANNELS)
        index = positions_in_period(base, start, tile, y, INDEX)
        if mask.inner == 1:  # neighbours are in neighbouring channels
            channel = index % CHANNELS
            if CHANNELS % 8 == 0:
                channel = tl.max_contiguous(tl.multiple_of(channel, 8), 8)
            threshold = tl.load(mask.thresholds + channel, mask=tile.inside, other=0)
        else:
            channel = index // mask.inner % CHANNELS
            threshold = tl.load(mask.thresholds + channel, mask=tile.inside, other=0)
        scale = scale_of(threshold, COMPUTE)
    else:
        threshold = mask.threshold
        scale = mask.scale
    keep = reaches16(mask.key, PhiloxPosition(tile.first, 0, 0, 8), y, threshold.to(tl.uint32), 7)
    if CHANNELS:
        keep = keep & (threshold < 65536)
    return tl.where(keep, y * scale, 0.0)


@triton.jit
def biased(x, bias, start, tile, inside, COLUMNS: tl.constexpr, COMPUTE: tl.constexpr):
    h = tl.load(x + tile.offsets, mask=inside, other=0).to(COMPUTE)
    if bias is not None:
        column = positions_in_period(start % COLUMNS, start, tile, h, tl.int32) % COLUMNS
        if COLUMNS % 8 == 0:
            column = tl.max_contiguous(tl.multiple_of(column, 8), 8)
        h += tl.load(bias + column, mask=inside, other=0).to(COMPUTE)
    return h


@triton.jit
def drop_block(
    x, residual, gradient, out, bias, mask, start,
    ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
    COMPUTE: tl.constexpr, tile,
):  # fmt: skip
    # If all is dropped nothing is loaded: activations of 0 are 0, and the mask is free.
    alive = tl.where(mask.alive, tile.inside, False)
    y = biased(x, bias, start, tile, alive, COLUMNS, COMPUTE)
    if gradient is None:
        y = activate(y, ACTIVATION)
    else:
        g = tl.load(gradient + tile.offsets, mask=alive, other=0).to(COMPUTE)
        y = backpropagate(g, y, ACTIVATION)
    y = drop(y, mask, start, tile, CHANNELS, INDEX, COMPUTE)
    if residual is not None:
        y = tl.load(residual + tile.offsets, mask=tile.inside).to(COMPUTE) + y
    tl.store(out + tile.offsets, y.to(out.dtype.element_ty), mask=tile.inside)


@triton.jit(do_not_specialize=["seed", "n", "inner", "turns"])
def dropout_kernel(
    x, residual, gradient, out, seed, bias, drop_thresholds, n, inner, turns,
    ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr,
    COMPUTE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out = residual + dropout(activation(x + bias)) over n elements in memory order.

    With a gradient of that: out = the gradient by x.  A program works on `turns` chunks.

    residual         [n] or None
    gradient         [n] or None
    seed             int64[1]
    bias             [COLUMNS] or None         along the last dimension
    drop_thresholds  int32[1] or [CHANNELS]    rates times 65536; channel = index / inner % CHANNELS
    """
    block = CHUNK * turns.to(tl.int64)
    start = tl.program_id(0) * block
    mask = load_mask(seed, drop_thresholds, inner, CHANNELS, COMPUTE)
    stop = tl.minimum(n, start + block)
    for_each_tile(
        drop_block,
        (x, residual, gradient, out, bias, mask, start, ACTIVATION, COLUMNS, CHANNELS, INDEX, COMPUTE),
        start, stop // 16 * 16, stop, CHUNK, 16,
    )  # fmt: skip
