"""Per-sample sums over positions: for ghost norms, and for gradients of norm layers and biases.

Every sum runs in a fixed order, without atomics, so that it is deterministic.
"""

import triton
import triton.language as tl


@triton.jit
def inner_products(
    x, sample, row, column, positions, features,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """⟨x_r, x_c⟩ for the positions r of one tile and c of another, of one sample; 0 beyond the last.

    Products of 16-bit numbers are exact in float32, in which they are added up.
    """
    # Tiles start at 64-bit offsets: a sample of language model logits has more elements than 32 bits count.
    base = x + sample * positions * features
    rows = base + row.to(tl.int64) * BLOCK * features
    columns = base + column.to(tl.int64) * BLOCK * features
    r = tl.arange(0, BLOCK)
    is_row, is_column = row * BLOCK + r < positions, column * BLOCK + r < positions
    products = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, features, DEPTH):
        k = first + tl.arange(0, DEPTH)
        mask = k < features
        a = tl.load(
            rows + r[:, None] * features + k[None, :], mask=is_row[:, None] & mask[None, :], other=0.0
        )
        b = tl.load(
            columns + r[None, :] * features + k[:, None], mask=is_column[None, :] & mask[:, None], other=0.0
        )
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        products = tl.dot(a, b, products, input_precision=PRECISION)
    return products


@triton.jit(do_not_specialize=["samples", "positions"])
def ghost_sums_kernel(
    left, right, partial, samples, positions, p, d,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sums over one tile of inner products on or below the diagonal; the products stay in registers.

    left       [samples, positions, p], right [samples, positions, d]: contiguous
    partial    fp32[5, samples, tiles], with tiles counted row by row of the triangle
    WIDEN                               for the interpreter, whose dot does not support bfloat16
    grid       samples · tiles² of the square; programs above the diagonal do nothing
    """
    tiles = tl.cdiv(positions, BLOCK)
    pid = tl.program_id(0)
    sample = (pid // (tiles * tiles)).to(tl.int64)
    row = pid // tiles % tiles
    column = pid % tiles
    if column <= row:
        outer = inner_products(left, sample, row, column, positions, p, PRECISION, WIDEN, BLOCK, DEPTH)
        inner = inner_products(right, sample, row, column, positions, d, PRECISION, WIDEN, BLOCK, DEPTH)
        times = tl.where(row == column, 1.0, 2.0)
        position = tl.arange(0, BLOCK)
        diagonal = (row * BLOCK + position)[:, None] == (column * BLOCK + position)[None, :]
        count = tiles * (tiles + 1) // 2
        out = partial + sample * count + row * (row + 1) // 2 + column
        stride = samples.to(tl.int64) * count
        tl.store(out, times * tl.sum(outer * inner))
        tl.store(out + stride, times * tl.sum(outer * outer))
        tl.store(out + 2 * stride, times * tl.sum(inner * inner))
        tl.store(out + 3 * stride, tl.sum(tl.where(diagonal, outer, 0.0)))
        tl.store(out + 4 * stride, tl.sum(tl.where(diagonal, inner, 0.0)))


@triton.jit(do_not_specialize=["positions"])
def sample_sums_kernel(
    grad, x, mean, deviation, weight, bias, positions, features, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """Σ grad · normalized x, and Σ grad, over the positions of one sample for some features, in one pass.

    grad, x          [samples, positions, features], contiguous
    mean, deviation  fp32[samples, positions]: x becomes (x - mean) · deviation; None if x is normalized
    weight, bias     fp32[samples, features]; None if not wanted
    grid             samples · blocks of features
    """
    blocks = tl.cdiv(features, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    base = sample * positions * features
    products = tl.zeros([ROWS, BLOCK], tl.float32)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, positions, ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < positions)[:, None] & (columns < features)[None, :]
        offsets = base + rows[:, None] * features + columns[None, :]
        g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
        sums += g
        if weight is not None:
            value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
            if mean is not None:
                at = sample * positions + rows
                less = tl.load(mean + at, mask=rows < positions, other=0.0)
                times = tl.load(deviation + at, mask=rows < positions, other=0.0)
                value = (value - less[:, None]) * times[:, None]
            products += g * value
    out = sample * features + columns
    if weight is not None:
        tl.store(weight + out, tl.sum(products, 0), mask=columns < features)
    if bias is not None:
        tl.store(bias + out, tl.sum(sums, 0), mask=columns < features)
