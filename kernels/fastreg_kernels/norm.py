"""Measures norms over all tensors in one read: deterministic, without atomics or host syncs."""

import triton
import triton.language as tl

from .random import PhiloxPosition
from .step import COUNT, FIRST, ROW, STREAM, any_state, load_row, run_stages


@triton.jit
def greater(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def gather(total, g, KIND: tl.constexpr):
    if KIND == "largest":
        return greater(total, tl.abs(g))
    elif KIND == "absolute":
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
    WIDE: tl.constexpr, KIND: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    p, u = run_stages(gradient, row, stages, storage, at, start, offsets, mask, G, COMPUTE, WIDE, False)
    if KIND == "momentum":
        u = u[1]
    if RANDOM:  # random values are the only masked lanes that are not 0
        u = tl.where(mask, u, 0.0)
    return u


@triton.jit(do_not_specialize=["turns"])
def norm_kernel(
    table, gradients, steps, step_scalars, work, partial, turns, stages, storage,
    G: tl.constexpr, COMPUTE: tl.constexpr, COLUMNS: tl.constexpr, STEP_SCALARS: tl.constexpr,
    VECTOR: tl.constexpr, CHUNK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """partial[program] = Σ u² over one block of `turns` chunks; u is the gradient after some stages.

    KIND "largest" takes max |u|, "absolute" Σ |u|, "momentum" Σ m² of the last stage's (update, momentum).

    Without stages: 4 bytes and 4.5 instructions per fp32 element on sm_90.  With them, loads used only by the
    weight are eliminated.  VECTOR is 0 if no stage is random.  Arguments as for `step_kernel`.
    """
    LARGEST: tl.constexpr = KIND == "largest"
    RANDOM: tl.constexpr = VECTOR > 0
    pid = tl.program_id(0)
    tensor = tl.load(work + 2 * pid)
    block = CHUNK * turns.to(tl.int64)
    start = tl.load(work + 2 * pid + 1) * block
    header = table + tensor.to(tl.int64) * COLUMNS
    gradient = tl.load(gradients + tensor)
    first = tl.load(header + FIRST)
    stream = tl.load(header + STREAM).to(tl.uint32)
    scalar_row = tl.load(header + ROW)
    step = tl.load(steps + scalar_row).to(tl.uint32)
    row = load_row(header, step_scalars + scalar_row * STEP_SCALARS, stages, storage, COMPUTE)
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
            offsets < wide, G, COMPUTE, True, KIND, RANDOM,
        )  # fmt: skip
        total = gather(total, u, KIND)
    rest = tl.zeros([CHUNK // 2], COMPUTE)
    lead = 0
    if RANDOM:
        lead = (first + wide) % 8
    for s in range(wide - lead, stop, CHUNK // 2):
        offsets = s + tl.arange(0, CHUNK // 2)
        u = reduced(
            gradient, row, stages, storage, PhiloxPosition(first + s, stream, step, VECTOR), s, offsets,
            (offsets >= wide) & (offsets < stop), G, COMPUTE, False, KIND, RANDOM,
        )  # fmt: skip
        rest = gather(rest, u, KIND)
    a, b = combine(total, LARGEST).to(tl.float64), combine(rest, LARGEST).to(tl.float64)
    tl.store(partial + pid, greater(a, b) if LARGEST else a + b)


@triton.jit(do_not_specialize=["count", "limits", "out"])
def clip_factor_kernel(partial, count, limits, out, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """Combines the partial results in float64 and in a fixed order, see `reference.norm.clip_factor`."""
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
