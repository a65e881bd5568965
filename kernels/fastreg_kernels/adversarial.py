"""Moves adversarial inputs: a step along the gradient, back into the ball, within the bounds, in one pass.

A program works on a run of one sample, so that the radius and the step size of a sample are scalars.  Runs
start at multiples of 16 elements of the whole tensor, as 128-bit accesses do; the elements of a sample before
and after them are done 16 at a time.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .random import PhiloxPosition, laplace, normal, uniform
from .rules import sign


class Bounds(NamedTuple):
    """The bounds of elements: scalars, or tables where element i of a sample has i / spatial % channels."""

    lower: Any
    upper: Any
    spatial: Any
    channels: Any  # None for scalars


class Sample(NamedTuple):
    """One sample: addresses of its tensors (`None` where there is none) and its numbers."""

    x: Any
    gradient: Any
    clean: Any
    out: Any
    master: Any
    first: Any  # index of its first element
    radius: Any
    size: Any  # of the step
    keep: Any  # for the projection
    key: Any  # of the noise
    peak: Any  # index of the one element that moves, for the direction "peak"


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
def direction(sample, s, offsets, inside, KIND: tl.constexpr, COMPUTE: tl.constexpr, VECTOR: tl.constexpr):
    """The direction that a sample moves along, see `reference.direction`."""
    if sample.gradient is None:
        like = tl.zeros(offsets.shape, COMPUTE)
        return noise(sample.key, PhiloxPosition(s, 0, 0, VECTOR), like, KIND).to(COMPUTE)
    else:
        g = tl.load(sample.gradient + offsets, mask=inside, other=0).to(COMPUTE)
        if KIND == "sign":
            return sign(g)
        elif KIND == "peak":
            return tl.where((offsets - sample.first).to(tl.int32) == sample.peak, sign(g), 0.0)
        else:
            tl.static_assert(KIND == "scaled")
            return finite(g)


@triton.jit
def clamp(y, low, high):
    return tl.clamp(y, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def projected(y, clean, radius, keep, BALL: tl.constexpr):
    if BALL == "linf":
        return clamp(y, clean - radius, clean + radius)
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
def bound(limit, bounds, index, inside, COMPUTE: tl.constexpr):
    """The bound of each element of a sample: a scalar, or a table's entry."""
    if bounds.channels is None:
        return limit
    else:
        channel = index // bounds.spatial % bounds.channels
        return tl.load(limit + channel, mask=inside, other=0).to(COMPUTE)


@triton.jit
def step_block(
    sample, bounds, s, offsets, inside,
    KIND: tl.constexpr, BALL: tl.constexpr, COMPUTE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    y = tl.load(sample.x + offsets, mask=inside, other=0).to(COMPUTE)
    if sample.clean is None:
        centre = y
    else:
        centre = tl.load(sample.clean + offsets, mask=inside, other=0).to(COMPUTE)
    if KIND != "none":
        y += sample.size * direction(sample, s, offsets, inside, KIND, COMPUTE, VECTOR)
    y = projected(y, centre, sample.radius, sample.keep, BALL)
    stored = y
    narrow: tl.constexpr = sample.out.dtype.element_ty
    if narrow.primitive_bitwidth == 16:
        stored = towards(y, centre, narrow).to(COMPUTE)
    if bounds is not None:
        index = (offsets - sample.first).to(tl.int32)
        low = bound(bounds.lower, bounds, index, inside, COMPUTE)
        high = bound(bounds.upper, bounds, index, inside, COMPUTE)
        stored = clamp(stored, low, high)
        y = clamp(y, low, high)
    tl.store(sample.out + offsets, stored.to(narrow), mask=inside)
    if sample.master is not None:
        tl.store(sample.master + offsets, y, mask=inside)


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
        "step_scalars", "peaks", "lower", "upper", "seed", "row_stride", "inner", "blocks", "spatial",
        "channels",
    ]
)  # fmt: skip
def adversarial_step_kernel(
    tensors, step_scalars, peaks, lower, upper, seed, row_stride, inner, blocks, spatial, channels,
    KIND: tl.constexpr, BALL: tl.constexpr, BOUNDS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out = `reference.step` of samples of `inner` elements, in `blocks` programs each.

    tensors       x, gradient, clean, out, master:
      gradient      [samples, inner] or None    None where KIND is that of a noise, or "none": no step
      clean         [samples, inner] or None    the centre of the ball, x by default
      out           [samples, inner]            rounded towards the centre, if it has 16 bits
      master        COMPUTE [samples, inner]    the same, not rounded; or None
    step_scalars  COMPUTE [samples, 3]          radius, size of the step, `keep` of the projection
    row_stride                                  3; or 0 where all samples share the first row of these
    peaks         int64[samples] or None        KIND "peak": the one element that moves
    lower, upper                                BOUNDS "scalar" or "table", see `Bounds`; or None for "none"
    """
    x, gradient, clean, out, master = tensors
    COMPUTE: tl.constexpr = tl.float64 if out.dtype.element_ty.primitive_bitwidth == 64 else tl.float32
    VECTOR: tl.constexpr = 8 if out.dtype.element_ty.primitive_bitwidth == 16 else 4
    row, first, begin, stop, wide, rest = run_of(inner, blocks, BLOCK)
    scalars = step_scalars + row * row_stride
    radius, size, keep = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    key, peak = 0, 0
    if seed is not None:
        key = tl.load(seed)
    if KIND == "peak":
        peak = tl.load(peaks + row).to(tl.int32)
    sample = Sample(x, gradient, clean, out, master, first, radius, size, keep, key, peak)
    if BOUNDS == "none":
        bounds = None
    elif BOUNDS == "scalar":
        bounds = Bounds(tl.load(lower).to(COMPUTE), tl.load(upper).to(COMPUTE), None, None)
    else:
        bounds = Bounds(lower, upper, spatial, channels)
    for s in range(wide, rest, CHUNK):
        offsets = s + tl.arange(0, CHUNK)
        step_block(sample, bounds, s, offsets, offsets < rest, KIND, BALL, COMPUTE, VECTOR)
    for end in range(2):
        s = tl.where(end == 0, wide - 16, tl.maximum(wide, rest))
        offsets = s + tl.arange(0, 16)
        inside = (offsets >= begin) & (offsets < stop)
        step_block(sample, bounds, s, offsets, inside, KIND, BALL, COMPUTE, VECTOR)


@triton.jit
def size_block(
    sample, s, offsets, inside,
    KIND: tl.constexpr, SQUARES: tl.constexpr, COMPUTE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    w = direction(sample, s, offsets, inside, KIND, COMPUTE, VECTOR)
    if sample.clean is not None:
        x = tl.load(sample.x + offsets, mask=inside, other=0).to(COMPUTE)
        w = x + sample.size * w - tl.load(sample.clean + offsets, mask=inside, other=0).to(COMPUTE)
    if sample.gradient is None:  # noise is not 0 in masked lanes
        w = tl.where(inside, w, 0.0)
    return w * w if SQUARES else tl.abs(w)


@triton.jit(do_not_specialize=["step_scalars", "seed", "row_stride", "inner", "blocks"])
def adversarial_norm_kernel(
    x, gradient, clean, partial, step_scalars, seed, row_stride, inner, blocks,
    KIND: tl.constexpr, SQUARES: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """partial[program] = Σ w², or Σ |w|, over a run of a sample: w is the direction.

    With clean, it is the perturbation x + size · direction - clean.  Arguments as above.

    partial   float64[samples, blocks]
    """
    COMPUTE: tl.constexpr = tl.float64 if x.dtype.element_ty.primitive_bitwidth == 64 else tl.float32
    VECTOR: tl.constexpr = 8 if x.dtype.element_ty.primitive_bitwidth == 16 else 4
    row, first, begin, stop, wide, rest = run_of(inner, blocks, BLOCK)
    key, size = 0, 0.0
    if seed is not None:
        key = tl.load(seed)
    if clean is not None:
        size = tl.load(step_scalars + row * row_stride + 1)
    sample = Sample(x, gradient, clean, None, None, first, None, size, None, key, 0)
    total = tl.zeros([CHUNK], COMPUTE)
    for s in range(wide, rest, CHUNK):
        offsets = s + tl.arange(0, CHUNK)
        total += size_block(sample, s, offsets, offsets < rest, KIND, SQUARES, COMPUTE, VECTOR)
    ends = tl.zeros([16], COMPUTE)
    for end in range(2):
        s = tl.where(end == 0, wide - 16, tl.maximum(wide, rest))
        offsets = s + tl.arange(0, 16)
        inside = (offsets >= begin) & (offsets < stop)
        ends += size_block(sample, s, offsets, inside, KIND, SQUARES, COMPUTE, VECTOR)
    tl.store(partial + tl.program_id(0), tl.sum(total).to(tl.float64) + tl.sum(ends).to(tl.float64))
