"""Clips per-sample gradients: their norms, the clip factors, the sum of the clipped gradients.

Rows are samples.  Every row is read once for its norm and once for the sum.  Sums run in a fixed order,
without atomics, so that they are deterministic.
"""

import triton
import triton.language as tl

from .step import at_address

# Columns of the table.
SAMPLES = tl.constexpr(0)  # address of [samples, length]
LENGTH = tl.constexpr(1)  # elements of a row
SUM = tl.constexpr(2)  # address of [length]
SEGMENT = tl.constexpr(3)  # row of its factors: 0 for all if they share theirs
COLUMNS = tl.constexpr(4)


@triton.jit
def squares(row, dtype: tl.constexpr, offsets, mask, WIDE: tl.constexpr):
    g = tl.load(at_address(row, dtype, offsets, WIDE), mask=mask, other=0).to(tl.float64)
    return g * g


@triton.jit(do_not_specialize=["blocks"])
def per_sample_norm_kernel(
    table, work, partial, blocks, G: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """partial[sample, block] = Σ g² over one block of one row; a program for each.

    Sums are in float64: a norm that is too small would clip a sample too little, and squares of large
    gradients overflow float32.

    table    int64[tensors, COLUMNS]
    work     int32[blocks, 2]          (tensor, block of it)
    partial  float64[samples, blocks]
    """
    pid = tl.program_id(0)
    sample, entry = pid // blocks, work + 2 * (pid % blocks)
    header = table + tl.load(entry).to(tl.int64) * COLUMNS
    start = tl.load(entry + 1).to(tl.int64) * BLOCK
    length = tl.load(header + LENGTH)
    row = tl.load(header + SAMPLES) + sample.to(tl.int64) * length * (G.primitive_bitwidth // 8)
    stop = tl.minimum(length, start + BLOCK)
    wide = tl.where(row % 16 == 0, stop // 16 * 16, start)
    total = tl.zeros([CHUNK], tl.float64)
    for s in range(start, wide, CHUNK):
        offsets = s + tl.arange(0, CHUNK)
        total += squares(row, G, offsets, offsets < wide, True)
    rest = tl.zeros([CHUNK // 2], tl.float64)
    for s in range(wide, stop, CHUNK // 2):
        offsets = s + tl.arange(0, CHUNK // 2)
        rest += squares(row, G, offsets, offsets < stop, False)
    tl.store(partial + pid, tl.sum(total) + tl.sum(rest))


@triton.jit(do_not_specialize=["blocks", "samples"])
def per_sample_factor_kernel(
    partial, segments, limits, norms, factors, blocks, samples, BLOCK: tl.constexpr
):  # fmt: skip
    """Norm and factor of one sample in one segment, from its partial sums; a program for each.

    partial   float64[samples, blocks]
    segments  int64[segments, 2]           the range of its blocks: first, and the one after the last
    limits    float64[segments]            largest norms
    norms     float64[segments, samples]
    factors   float64[segments, samples]   0 where the norm is not finite, or float32 has no factor
    """
    pid = tl.program_id(0)
    segment, sample = pid // samples, pid % samples
    start = tl.load(segments + 2 * segment)
    stop = tl.load(segments + 2 * segment + 1)
    first = partial + sample.to(tl.int64) * blocks + start
    count = (stop - start).to(tl.int32)
    total = tl.zeros([BLOCK], tl.float64)
    for s in range(0, count, BLOCK):
        offsets = s + tl.arange(0, BLOCK)
        total += tl.load(first + offsets, mask=offsets < count, other=0.0)
    norm = tl.sqrt(tl.sum(total))
    factor = tl.minimum(tl.load(limits + segment) / (norm + 1e-6), 1.0)
    tl.store(norms + pid, norm)
    counts = (norm < float("inf")) & (factor >= 1.1754943508222875e-38)
    tl.store(factors + pid, tl.where(counts, factor, 0.0))


@triton.jit
def sum_block(
    rows, sum, factors, samples, stride, offsets, mask, G: tl.constexpr, S: tl.constexpr,
    COMPUTE: tl.constexpr, ACCUMULATE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    total = tl.zeros(offsets.shape, COMPUTE)
    if ACCUMULATE:
        total = tl.load(at_address(sum, S, offsets, WIDE), mask=mask).to(COMPUTE)
    row = rows
    for sample in range(samples):
        factor = tl.load(factors + sample).to(COMPUTE)
        g = tl.load(at_address(row, G, offsets, WIDE), mask=mask).to(COMPUTE)
        total += factor * tl.where(factor > 0, g, 0.0)
        row += stride
    tl.store(at_address(sum, S, offsets, WIDE), total.to(S), mask=mask)


@triton.jit(do_not_specialize=["samples"])
def per_sample_sum_kernel(
    table, work, factors, samples, G: tl.constexpr, S: tl.constexpr, COMPUTE: tl.constexpr,
    ACCUMULATE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """sum = Σ factor · g over the samples, added to `sum` if ACCUMULATE.

    Samples with a factor of 0 are skipped, since 0 · NaN is not 0.

    table    int64[tensors, COLUMNS]
    work     int32[programs, 2]            (tensor, chunk)
    factors  float64[segments, samples]
    """
    pid = tl.program_id(0)
    header = table + tl.load(work + 2 * pid).to(tl.int64) * COLUMNS
    start = tl.load(work + 2 * pid + 1).to(tl.int64) * CHUNK
    length = tl.load(header + LENGTH)
    rows = tl.load(header + SAMPLES)
    sum = tl.load(header + SUM)
    row = factors + tl.load(header + SEGMENT) * samples
    stride = length * (G.primitive_bitwidth // 8)
    stop = tl.minimum(length, start + CHUNK)
    wide = tl.where((rows | sum | stride) % 16 == 0, stop // 16 * 16, start)
    if wide > start:
        offsets = start + tl.arange(0, CHUNK)
        sum_block(rows, sum, row, samples, stride, offsets, offsets < wide, G, S, COMPUTE, ACCUMULATE, True)
    for s in range(wide, stop, CHUNK // 2):
        offsets = s + tl.arange(0, CHUNK // 2)
        sum_block(rows, sum, row, samples, stride, offsets, offsets < stop, G, S, COMPUTE, ACCUMULATE, False)
