"""Sums over the units of a parameter: rows of a matrix, output channels of a convolution."""

import triton
import triton.language as tl

from .step import COUNT, PARAMETER, at_address


@triton.jit
def unit_squares_kernel(
    table, gradients, work, out,
    P: tl.constexpr, G: tl.constexpr, COMPUTE: tl.constexpr, COLUMNS: tl.constexpr, LAYOUT: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One program sums one unit: out[program] = (Σ p², Σ g²).

    work       int32[programs, 2]        (tensor, unit)
    out        COMPUTE[programs, 2]
    LAYOUT     column of the stride of units; the next one holds their number
    """
    pid = tl.program_id(0)
    tensor = tl.load(work + 2 * pid)
    unit = tl.load(work + 2 * pid + 1).to(tl.int64)
    row = table + tensor.to(tl.int64) * COLUMNS
    stride, count = tl.load(row + LAYOUT), tl.load(row + LAYOUT + 1)
    length = tl.load(row + COUNT) // count
    # A unit is a run of `stride` elements, again and again if its dimension is not the slowest in memory.
    first = unit * stride
    parameter = tl.load(row + PARAMETER) + first * (P.primitive_bitwidth // 8)
    gradient = tl.load(gradients + tensor) + first * (G.primitive_bitwidth // 8)
    whole = ((parameter | gradient) % 16 == 0) & (length == stride)
    wide = tl.where(whole, length // 16 * 16, 0)
    p_squares = tl.zeros([CHUNK], COMPUTE)
    g_squares = tl.zeros([CHUNK], COMPUTE)
    for s in range(0, wide, CHUNK):
        offsets = s + tl.arange(0, CHUNK)
        p = tl.load(at_address(parameter, P, offsets, True), mask=offsets < wide, other=0.0).to(COMPUTE)
        g = tl.load(at_address(gradient, G, offsets, True), mask=offsets < wide, other=0.0).to(COMPUTE)
        p_squares += p * p
        g_squares += g * g
    p_rest = tl.zeros([CHUNK // 2], COMPUTE)
    g_rest = tl.zeros([CHUNK // 2], COMPUTE)
    for s in range(wide, length, CHUNK // 2):
        j = s + tl.arange(0, CHUNK // 2)
        offsets = j // stride * (stride * count) + j % stride
        p = tl.load(at_address(parameter, P, offsets, False), mask=j < length, other=0.0).to(COMPUTE)
        g = tl.load(at_address(gradient, G, offsets, False), mask=j < length, other=0.0).to(COMPUTE)
        p_rest += p * p
        g_rest += g * g
    tl.store(out + 2 * pid, tl.sum(p_squares) + tl.sum(p_rest))
    tl.store(out + 2 * pid + 1, tl.sum(g_squares) + tl.sum(g_rest))
