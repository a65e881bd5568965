"""Norms over all tensors: one read of what they are of, deterministic, no atomics, no host sync."""

import triton
import triton.language as tl

from .random import PhiloxPosition
from .step import COUNT, FIRST, ROW, STREAM, any_state, load_row, run_stages


@triton.jit
def greater(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def gather(total, g, LARGEST: tl.constexpr, ABSOLUTE: tl.constexpr):
    if LARGEST:
        return greater(total, tl.abs(g))
    elif ABSOLUTE:
        return total + tl.abs(g)
    else:
        return total + g * g


@triton.jit
def combine(values, LARGEST: tl.constexpr):
    if LARGEST:
        return tl.reduce(values, 0, greater)
    else:
        return tl.sum(values)


@triton.jit
def reduced(
    gradient, row, stages, storage, at, start, offsets, mask, G: tl.constexpr, COMPUTE: tl.constexpr,
    WIDE: tl.constexpr, MOMENTUM: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    p, u = run_stages(gradient, row, stages, storage, at, start, offsets, mask, G, COMPUTE, WIDE, False)
    if MOMENTUM:
        u = u[1]
    if RANDOM:  # the one thing that is not 0 where nothing is
        u = tl.where(mask, u, 0.0)
    return u


@triton.jit(do_not_specialize=["turns"])
def norm_kernel(
    table, gradients, steps, step_scalars, work, partial, turns, stages, storage,
    G: tl.constexpr, COMPUTE: tl.constexpr, COLUMNS: tl.constexpr, STEP_SCALARS: tl.constexpr,
    RANDOM: tl.constexpr, VECTOR: tl.constexpr, CHUNK: tl.constexpr,
    LARGEST: tl.constexpr, ABSOLUTE: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """partial[program] = Σ u² over one block of `turns` chunks; u is the gradient after some stages.

    If LARGEST it is max |u|, if ABSOLUTE Σ |u|.

    Without stages: 4 bytes and 4.5 instructions per fp32 element on sm_90.  With them, what they need and no
    more: nobody reads what only the weight would need.  MOMENTUM: the last one returns (update, momentum).
    Arguments as for `step_kernel`.
    """
    pid = tl.program_id(0)
    tensor = tl.load(work + 2 * pid)
    block = CHUNK * turns.to(tl.int64)
    start = tl.load(work + 2 * pid + 1) * block
    header = table + tensor.to(tl.int64) * COLUMNS
    gradient = tl.load(gradients + tensor)
    first = tl.load(header + FIRST)
    stream = tl.load(header + STREAM).to(tl.uint32)
    number_row = tl.load(header + ROW)
    step = tl.load(steps + number_row).to(tl.uint32)
    row = load_row(header, step_scalars + number_row * STEP_SCALARS, stages, storage, COMPUTE)
    stop = tl.minimum(tl.load(header + COUNT), start + block)
    aligned = gradient % 16 == 0
    if len(stages) > 0:
        aligned = (gradient | any_state(row)) % 16 == 0
    if RANDOM:
        aligned = aligned & (first % 8 == 0)
    wide = tl.where(aligned, stop // 16 * 16, start)
    total = tl.zeros([CHUNK], COMPUTE)
    for s in range(start, wide, CHUNK):
        offsets = s + tl.arange(0, CHUNK)
        u = reduced(
            gradient, row, stages, storage, PhiloxPosition(first + s, stream, step, VECTOR), s, offsets,
            offsets < wide, G, COMPUTE, True, MOMENTUM, RANDOM,
        )  # fmt: skip
        total = gather(total, u, LARGEST, ABSOLUTE)
    rest = tl.zeros([CHUNK // 2], COMPUTE)
    lead = 0
    if RANDOM:
        lead = (first + wide) % 8
    for s in range(wide - lead, stop, CHUNK // 2):
        offsets = s + tl.arange(0, CHUNK // 2)
        u = reduced(
            gradient, row, stages, storage, PhiloxPosition(first + s, stream, step, VECTOR), s, offsets,
            (offsets >= wide) & (offsets < stop), G, COMPUTE, False, MOMENTUM, RANDOM,
        )  # fmt: skip
        rest = gather(rest, u, LARGEST, ABSOLUTE)
    a, b = combine(total, LARGEST).to(tl.float64), combine(rest, LARGEST).to(tl.float64)
    tl.store(partial + pid, greater(a, b) if LARGEST else a + b)


@triton.jit(do_not_specialize=["count", "limits", "out"])
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
