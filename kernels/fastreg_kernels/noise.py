"""Adds noise to activations, or multiplies them by it, in one pass over memory.

The scale of the noise is read from memory, one for all or one for each row: a new value needs no compilation.
"""

import triton
import triton.language as tl

from .dropout import positions_in_period
from .random import PhiloxPosition, bits16, interleave, join4, normal
from .tiles import for_each_tile


@triton.jit
def symmetric(key, at, like):
    """Uniform in (-1, 1), odd multiples of 2⁻¹⁶: the addition is exact, and so is the mean of 0."""
    whole = bits16(key, at, like, 7).to(tl.int32, bitcast=True).to(tl.float32)
    return whole * 3.0517578125e-05 + -0.9999847412109375


@triton.jit
def spread(group, like, VECTOR: tl.constexpr):
    """Repeats a value for each of the VECTOR contiguous elements of its group, within a thread."""
    four = join4(group, group, group, group)
    if VECTOR == 8:
        return interleave(four, four, like)
    else:
        return tl.reshape(four, like.shape)


@triton.jit
def row_scales(
    scales, inner, start, tile, like,
    GROUPED: tl.constexpr, VECTOR: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Loads the scale of each element of a tile."""
    first_row = start // inner
    base = start % inner
    if GROUPED:  # one load and one division for each group
        offsets = VECTOR * tl.arange(0, like.shape[0] // VECTOR)
        index = base.to(INDEX) + (tile.first - start).to(INDEX) + offsets
        row = index // inner.to(INDEX)
        inside = tile.first + offsets < tile.stop
        scale = spread(tl.load(scales + first_row + row, mask=inside, other=0), like, VECTOR)
        if inner % VECTOR != 0:  # groups straddle rows, two at most
            here = (row + 1) * inner.to(INDEX) - index  # elements until the next row
            further = (here < VECTOR) & (tile.first + offsets + here < tile.stop)
            following = tl.load(scales + first_row + row + 1, mask=further, other=0)
            until = spread(tl.minimum(here, VECTOR).to(tl.int32), like, VECTOR)
            before = tl.arange(0, like.shape[0]) % VECTOR < until
            scale = tl.where(before, scale, spread(following, like, VECTOR))
        return scale.to(COMPUTE)
    else:
        row = first_row + positions_in_period(base, start, tile, like, INDEX) // inner.to(INDEX)
        return tl.load(scales + row, mask=tile.inside, other=0).to(COMPUTE)


@triton.jit
def noise_block(
    x, out, key, scales, scale, inner, start,
    KIND: tl.constexpr, ROWS: tl.constexpr, GROUPED: tl.constexpr, VECTOR: tl.constexpr, INDEX: tl.constexpr,
    COMPUTE: tl.constexpr, tile,
):  # fmt: skip
    y = tl.load(x + tile.offsets, mask=tile.inside).to(COMPUTE)
    if ROWS:
        scale = row_scales(scales, inner, start, tile, y, GROUPED, VECTOR, INDEX, COMPUTE)
    if KIND == "uniform":
        z = symmetric(key, PhiloxPosition(tile.first, 0, 0, VECTOR), y).to(COMPUTE)
    else:
        z = normal(key, PhiloxPosition(tile.first, 0, 0, VECTOR), y, 7).to(COMPUTE)
    if KIND == "multiplicative":
        noisy = y * (1 + scale * z)
    else:
        noisy = y + scale * z
    y = tl.where(scale == 0, y, noisy)
    tl.store(out + tile.offsets, y.to(out.dtype.element_ty), mask=tile.inside)


@triton.jit(do_not_specialize=["seed", "scales", "n", "inner", "turns"])
def noise_kernel(
    x, out, seed, scales, n, inner, turns,
    KIND: tl.constexpr, ROWS: tl.constexpr, GROUPED: tl.constexpr, VECTOR: tl.constexpr, INDEX: tl.constexpr,
    COMPUTE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Adds noise of a KIND to n elements in memory order; a program works on `turns` chunks.

    seed     int64[1]
    scales   [1], or with ROWS [n / inner]     element i has that of row i / inner
    GROUPED                                    whether inner is at least VECTOR
    """
    block = CHUNK * turns.to(tl.int64)
    start = tl.program_id(0) * block
    key = tl.load(seed)
    if ROWS:
        scale = 0.0
    else:
        scale = tl.load(scales).to(COMPUTE)
    stop = tl.minimum(n, start + block)
    for_each_tile(
        noise_block,
        (x, out, key, scales, scale, inner, start, KIND, ROWS, GROUPED, VECTOR, INDEX, COMPUTE),
        start, stop // 16 * 16, stop, CHUNK, 16,
    )  # fmt: skip
