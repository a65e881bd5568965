"""Noise on activations: one pass over memory, and the same noise wherever it is asked for.

The scale of the noise is read from memory, one for all or one for each row: no value compiles anew.
"""

import triton
import triton.language as tl

from .dropout import within
from .random import PhiloxPosition, bits16, interleave, join4, normal


@triton.jit
def symmetric(key, at, like):
    """Uniform in (-1, 1), odd multiples of 2⁻¹⁶: the sum is exact, and so is the mean of 0."""
    whole = bits16(key, at, like, 7).to(tl.int32, bitcast=True).to(tl.float32)
    return whole * 3.0517578125e-05 + -0.9999847412109375


@triton.jit
def spread(group, like, VECTOR: tl.constexpr):
    """A value for each group of so many contiguous elements → one for each element, within a thread."""
    four = join4(group, group, group, group)
    if VECTOR == 8:
        return interleave(four, four, like)
    else:
        return tl.reshape(four, like.shape)


@triton.jit
def row_scales(
    scales, inner, start, s, like, inside, limit,
    GROUPED: tl.constexpr, VECTOR: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    first = start // inner
    base = start % inner
    if GROUPED:  # one load and one division for each group
        offsets = VECTOR * tl.arange(0, like.shape[0] // VECTOR)
        place = base.to(INDEX) + (s - start).to(INDEX) + offsets
        row = place // inner.to(INDEX)
        own = spread(tl.load(scales + first + row, mask=s + offsets < limit, other=0), like, VECTOR)
        if inner % VECTOR != 0:  # groups straddle rows, two at most
            here = (row + 1) * inner.to(INDEX) - place  # elements until the next row
            further = (here < VECTOR) & (s + offsets + here < limit)
            following = spread(tl.load(scales + first + row + 1, mask=further, other=0), like, VECTOR)
            until = spread(tl.minimum(here, VECTOR).to(tl.int32), like, VECTOR)
            own = tl.where(tl.arange(0, like.shape[0]) % VECTOR < until, own, following)
        return own.to(COMPUTE)
    else:
        row = first + within(base, start, s, like, INDEX) // inner.to(INDEX)
        return tl.load(scales + row, mask=inside, other=0).to(COMPUTE)


@triton.jit
def noise_block(
    x, out, key, scales, scale, inner, start, s, offsets, limit,
    KIND: tl.constexpr, ROWS: tl.constexpr, GROUPED: tl.constexpr, VECTOR: tl.constexpr, INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    inside = offsets < limit
    y = tl.load(x + offsets, mask=inside).to(COMPUTE)
    if ROWS:
        scale = row_scales(scales, inner, start, s, y, inside, limit, GROUPED, VECTOR, INDEX, COMPUTE)
    if KIND == "uniform":
        z = symmetric(key, PhiloxPosition(s, 0, 0, VECTOR), y).to(COMPUTE)
    else:
        z = normal(key, PhiloxPosition(s, 0, 0, VECTOR), y, 7).to(COMPUTE)
    if KIND == "multiplicative":
        noisy = y * (1 + scale * z)
    else:
        noisy = y + scale * z
    y = tl.where(scale == 0, y, noisy)
    tl.store(out + offsets, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "scales", "n", "inner", "turns"])
def noise_kernel(
    x, out, seed, scales, n, inner, turns,
    KIND: tl.constexpr, ROWS: tl.constexpr, GROUPED: tl.constexpr, VECTOR: tl.constexpr, INDEX: tl.constexpr,
    COMPUTE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Noise of a KIND on n elements in memory order; a program works on `turns` chunks.

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
    # Two loops around one body, as in `step`: the mask of the wide one is constant over 16 elements.
    stop = tl.minimum(n, start + block)
    wide = stop // 16 * 16
    for s in range(start, wide, CHUNK):
        noise_block(
            x, out, key, scales, scale, inner, start, s, s + tl.arange(0, CHUNK), wide,
            KIND, ROWS, GROUPED, VECTOR, INDEX, COMPUTE,
        )  # fmt: skip
    for s in range(wide, stop, 16):
        noise_block(
            x, out, key, scales, scale, inner, start, s, s + tl.arange(0, 16), stop,
            KIND, ROWS, GROUPED, VECTOR, INDEX, COMPUTE,
        )  # fmt: skip
