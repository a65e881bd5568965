"""The global gradient norm: one read of the gradients, deterministic, no atomics, no host sync."""

import triton
import triton.language as tl

from .step import COUNT, at_address


@triton.jit
def greater(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def gather(total, g, LARGEST: tl.constexpr):
    if LARGEST:
        return greater(total, tl.abs(g))
    else:
        return total + g * g


@triton.jit
def combine(values, LARGEST: tl.constexpr):
    if LARGEST:
        return tl.reduce(values, 0, greater)
    else:
        return tl.sum(values)


@triton.jit
def norm_kernel(
    table, gradients, work, partial,
    G: tl.constexpr, COMPUTE: tl.constexpr, LARGEST: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """partial[program] = Σ g² or, if LARGEST, max |g| over one block.

    4 bytes and 4.5 instructions per fp32 element on sm_90.
    """
    pid = tl.program_id(0)
    tensor = tl.load(work + 2 * pid)
    start = tl.load(work + 2 * pid + 1).to(tl.int64) * BLOCK
    gradient = tl.load(gradients + tensor)
    stop = tl.minimum(tl.load(table + tensor.to(tl.int64) * COLUMNS + COUNT), start + BLOCK)
    wide = tl.where(gradient % 16 == 0, stop // 16 * 16, start)
    total = tl.zeros([CHUNK], COMPUTE)
    for s in range(start, wide, CHUNK):
        offsets = s + tl.arange(0, CHUNK)
        g = tl.load(at_address(gradient, G, offsets, True), mask=offsets < wide, other=0.0)
        total = gather(total, g.to(COMPUTE), LARGEST)
    rest = tl.zeros([128], COMPUTE)
    for s in range(wide, stop, 128):
        offsets = s + tl.arange(0, 128)
        g = tl.load(at_address(gradient, G, offsets, False), mask=offsets < stop, other=0.0)
        rest = gather(rest, g.to(COMPUTE), LARGEST)
    a, b = combine(total, LARGEST).to(tl.float64), combine(rest, LARGEST).to(tl.float64)
    tl.store(partial + pid, greater(a, b) if LARGEST else a + b)


@triton.jit(do_not_specialize=["count"])
def clip_factor_kernel(partial, count, limits, out, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """What follows from the partial results, in float64 and in a fixed order: see `reference.norm`."""
    total = tl.zeros([BLOCK], tl.float64)
    for s in range(0, count, BLOCK):
        offsets = s + tl.arange(0, BLOCK)
        value = tl.load(partial + offsets, mask=offsets < count, other=0.0)
        total = greater(total, value) if LARGEST else total + value
    whole = combine(total, LARGEST)
    max_norm, inverse_scale = tl.load(limits), tl.load(limits + 1)
    norm = (whole if LARGEST else tl.sqrt(whole)) * inverse_scale
    factor = tl.minimum(max_norm / (norm + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)
    bad = tl.where(tl.abs(whole) < float("inf"), 0.0, 1.0)
    tl.store(out, bad)
    tl.store(out + 1, whole)
    tl.store(out + 2, norm)
    tl.store(out + 3, norm * factor)
    tl.store(out + 4, factor * inverse_scale)
