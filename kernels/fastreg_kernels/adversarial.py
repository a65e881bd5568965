"""Adversarial inputs: a step along the gradient, back into the ball, within the bounds, in one pass.

A program works on a run of one sample, so that what a sample has of its own (its radius, the length of its
step) is a scalar.  Runs start at multiples of 16 elements of the whole, where 128-bit accesses do; what a
sample has before and behind them is done 16 elements at a time.
"""

import triton
import triton.language as tl

from .random import PhiloxPosition, laplace, normal, uniform


@triton.jit
def sign(g):
    return (g > 0).to(g.dtype) - (g < 0).to(g.dtype)


@triton.jit
def finite(g):
    return tl.where(tl.abs(g) < float("inf"), g, 0.0)


@triton.jit
def noise(key, at, like, KIND: tl.constexpr):
    if KIND == "uniform":
        return 2.0 * uniform(key, at, like) - 1.0
    elif KIND == "normal":
        return normal(key, at, like)
    else:
        tl.static_assert(KIND == "laplace")
        return laplace(key, at, like)


@triton.jit
def direction(
    gradient, key, peak, first, s, offsets, inside,
    KIND: tl.constexpr, COMPUTE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """What a sample moves along, of the KIND that `reference.direction` tells."""
    if gradient is None:
        like = tl.zeros(offsets.shape, COMPUTE)
        return noise(key, PhiloxPosition(s, 0, 0, VECTOR), like, KIND).to(COMPUTE)
    else:
        g = tl.load(gradient + offsets, mask=inside, other=0).to(COMPUTE)
        if KIND == "sign":
            return sign(g)
        elif KIND == "peak":
            return tl.where((offsets - first).to(tl.int32) == peak, sign(g), 0.0)
        else:
            tl.static_assert(KIND == "scaled")
            return finite(g)


@triton.jit
def within(y, low, high):
    return tl.clamp(y, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def projected(y, clean, radius, keep, BALL: tl.constexpr):
    if BALL == "linf":
        return within(y, clean - radius, clean + radius)
    elif BALL == "l2":
        return tl.where(keep < 1, clean + keep * (y - clean), y)
    elif BALL == "l1":
        away = y - clean
        less = tl.maximum(tl.abs(away) - keep, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return tl.where(keep > 0, clean + sign(away) * less, y)
    else:
        tl.static_assert(BALL == "none")
        return y


@triton.jit
def towards(y, clean, DTYPE: tl.constexpr):
    """y rounded to 16 bits, to the side where the clean input is."""
    near = y.to(DTYPE)
    down = y > clean
    value = near.to(tl.float32)
    beyond = tl.where(down, value > y, value < y)
    # One of the two neighbours: the other one is a unit in the last place away.
    bits = near.to(tl.int16, bitcast=True)
    other = bits + tl.where(down == (bits >= 0), -1, 1).to(tl.int16)
    return tl.where(beyond, other, bits).to(DTYPE, bitcast=True)


@triton.jit
def bound(table, scalar, index, spatial, channels, inside, BOUNDS: tl.constexpr, COMPUTE: tl.constexpr):
    if BOUNDS == "table":
        return tl.load(table + index // spatial % channels, mask=inside, other=0).to(COMPUTE)
    else:
        return scalar


@triton.jit
def step_block(
    x, gradient, clean, out, master, lower, upper, low, high, key, radius, size, keep, peak, spatial,
    channels, first, s, offsets, inside,
    KIND: tl.constexpr, BALL: tl.constexpr, BOUNDS: tl.constexpr, COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    y = tl.load(x + offsets, mask=inside, other=0).to(COMPUTE)
    if clean is None:
        centre = y
    else:
        centre = tl.load(clean + offsets, mask=inside, other=0).to(COMPUTE)
    if KIND != "none":
        y += size * direction(gradient, key, peak, first, s, offsets, inside, KIND, COMPUTE, VECTOR)
    y = projected(y, centre, radius, keep, BALL)
    stored = y
    if out.dtype.element_ty.primitive_bitwidth == 16:
        stored = towards(y, centre, out.dtype.element_ty).to(COMPUTE)
    if BOUNDS != "none":
        index = (offsets - first).to(tl.int32)
        low = bound(lower, low, index, spatial, channels, inside, BOUNDS, COMPUTE)
        high = bound(upper, high, index, spatial, channels, inside, BOUNDS, COMPUTE)
        stored = within(stored, low, high)
        y = within(y, low, high)
    tl.store(out + offsets, stored.to(out.dtype.element_ty), mask=inside)
    if master is not None:
        tl.store(master + offsets, y, mask=inside)


@triton.jit
def run_of(inner, blocks, BLOCK: tl.constexpr):
    """Sample, its first element, from where to where this program works, and from where to where wide."""
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    first = row * inner
    start = first // 16 * 16 + (pid % blocks).to(tl.int64) * BLOCK
    begin, stop = tl.maximum(first, start), tl.minimum(first + inner, start + BLOCK)
    return row, first, begin, stop, (begin + 15) // 16 * 16, stop // 16 * 16


@triton.jit(
    do_not_specialize=[
        "numbers", "peaks", "lower", "upper", "seed", "row_numbers", "inner", "blocks", "spatial", "channels",
    ]
)  # fmt: skip
def adversarial_step_kernel(
    x, gradient, clean, out, master, numbers, peaks, lower, upper, seed, row_numbers, inner, blocks, spatial,
    channels,
    KIND: tl.constexpr, COMPUTE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, BALL: tl.constexpr, BOUNDS: tl.constexpr,
):  # fmt: skip
    """out = what `reference.step` makes of samples of `inner` elements, in `blocks` programs each.

    gradient  [samples, inner] or None      None where KIND is that of a noise, or "none": no step
    clean     [samples, inner] or None      the centre of the ball, x by default
    out       [samples, inner]              rounded towards the centre, if it has 16 bits
    master    COMPUTE [samples, inner]      the same, not rounded; or None
    numbers   COMPUTE [samples, 3]          radius, size of the step, what the projection keeps
    row_numbers                             3; or 0 where all samples share the first row of these
    peaks     int64[samples] or None        KIND "peak": the one element that moves
    lower, upper                            the bounds: none, a scalar, or a table, where element i of a
                                            sample has that at i / spatial % channels
    """
    row, first, begin, stop, wide, rest = run_of(inner, blocks, BLOCK)
    own = numbers + row * row_numbers
    radius, size, keep = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    key, peak = 0, 0
    if seed is not None:
        key = tl.load(seed)
    if KIND == "peak":
        peak = tl.load(peaks + row).to(tl.int32)
    low, high = 0.0, 0.0
    if BOUNDS == "scalar":
        low, high = tl.load(lower).to(COMPUTE), tl.load(upper).to(COMPUTE)
    for s in range(wide, rest, CHUNK):
        offsets = s + tl.arange(0, CHUNK)
        step_block(
            x, gradient, clean, out, master, lower, upper, low, high, key, radius, size, keep, peak, spatial,
            channels, first, s, offsets, offsets < rest, KIND, BALL, BOUNDS, COMPUTE, VECTOR,
        )  # fmt: skip
    for end in range(2):
        s = tl.where(end == 0, wide - 16, tl.maximum(wide, rest))
        offsets = s + tl.arange(0, 16)
        inside = (offsets >= begin) & (offsets < stop)
        step_block(
            x, gradient, clean, out, master, lower, upper, low, high, key, radius, size, keep, peak, spatial,
            channels, first, s, offsets, inside, KIND, BALL, BOUNDS, COMPUTE, VECTOR,
        )  # fmt: skip


@triton.jit
def size_block(
    x, gradient, clean, key, size, first, s, offsets, inside,
    KIND: tl.constexpr, SQUARES: tl.constexpr, COMPUTE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    w = direction(gradient, key, 0, first, s, offsets, inside, KIND, COMPUTE, VECTOR)
    if clean is not None:
        here = tl.load(x + offsets, mask=inside, other=0).to(COMPUTE)
        w = here + size * w - tl.load(clean + offsets, mask=inside, other=0).to(COMPUTE)
    if gradient is None:  # the one thing that is not 0 where nothing is
        w = tl.where(inside, w, 0.0)
    return w * w if SQUARES else tl.abs(w)


@triton.jit(do_not_specialize=["numbers", "seed", "row_numbers", "inner", "blocks"])
def adversarial_norm_kernel(
    x, gradient, clean, partial, numbers, seed, row_numbers, inner, blocks,
    KIND: tl.constexpr, COMPUTE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """partial[program] = Σ w², or Σ |w|, over a run of a sample: w is the direction.

    With clean, it is the perturbation x + size · direction - clean.  Arguments as above.

    partial   float64[samples, blocks]
    """
    row, first, begin, stop, wide, rest = run_of(inner, blocks, BLOCK)
    key, size = 0, 0.0
    if seed is not None:
        key = tl.load(seed)
    if clean is not None:
        size = tl.load(numbers + row * row_numbers + 1)
    total = tl.zeros([CHUNK], COMPUTE)
    for s in range(wide, rest, CHUNK):
        offsets = s + tl.arange(0, CHUNK)
        inside = offsets < rest
        total += size_block(
            x, gradient, clean, key, size, first, s, offsets, inside, KIND, SQUARES, COMPUTE, VECTOR
        )
    ends = tl.zeros([16], COMPUTE)
    for end in range(2):
        s = tl.where(end == 0, wide - 16, tl.maximum(wide, rest))
        offsets = s + tl.arange(0, 16)
        inside = (offsets >= begin) & (offsets < stop)
        ends += size_block(
            x, gradient, clean, key, size, first, s, offsets, inside, KIND, SQUARES, COMPUTE, VECTOR
        )
    tl.store(partial + tl.program_id(0), tl.sum(total).to(tl.float64) + tl.sum(ends).to(tl.float64))
