"""Runs the fused optimizer step: one pass over memory, assembled from stages, one launch for many tensors.

The template below owns every load and store.  The stages (`rules`, `regularizers`) define the maths in
between, the `storage` how a weight is stored: both are device functions in plain tuples that are unrolled at
compile time, so adding one edits nothing here.

Per parameter and step it moves the bytes of the weight (read + write), the gradient (read) and each
state buffer (read + write), once: AdamW fp32 28 bytes in 29 instructions on sm_90, clip + AdamW + EMA 36
bytes in 40.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .random import PhiloxPosition

# Columns of the table that every row has; those of the chain follow. Only entry points name them: the key
# of a kernel in Triton's cache would depend on what was compiled before if a function that it calls did.
PARAMETER = tl.constexpr(0)  # address
COUNT = tl.constexpr(1)  # elements
FIRST = tl.constexpr(2)  # global index of element 0: not 0 for a shard
STREAM = tl.constexpr(3)  # which parameter, for random numbers
ROW = tl.constexpr(4)  # which row of step scalars
HEADER = tl.constexpr(5)


class Stage(NamedTuple):
    """One stage of the chain, as the kernel sees it."""

    # device function (p, u, at, *buffers, *units, *device_scalars, *rng_keys, *step_scalars)
    # -> (p, u, new buffers)
    fn: Any
    state: tuple  # table columns: addresses of its buffers
    dtypes: tuple  # and what these hold
    device_scalars: tuple  # table columns: addresses of float64 device scalars
    rng_keys: tuple  # table columns: integers handed over as they are (keys)
    step_scalars: tuple  # columns of the row of step scalars
    units: tuple  # table columns: addresses of vectors with an element for each unit
    layout: tuple  # table columns: how far units lie apart and how many there are; () without units
    momentum: Any  # constexpr: see `Stage.momentum` of fastreg


class Storage(NamedTuple):
    """How the weight is read from and written to memory."""

    read: Any  # device function (*raw sources) -> weight
    write: Any  # device function (weight, at, *rng_keys) -> raw targets
    sources: tuple  # table columns: addresses
    source_dtypes: tuple
    targets: tuple
    target_dtypes: tuple
    rng_keys: tuple


class Row(NamedTuple):
    """The row of the table for one tensor: addresses, and the arguments of each stage."""

    sources: tuple
    targets: tuple
    rng_keys: tuple
    state: tuple  # for each stage
    arguments: tuple  # for each stage
    units: tuple
    layouts: tuple


@triton.jit
def at_address(address, dtype: tl.constexpr, offsets, WIDE: tl.constexpr):
    # `multiple_of` takes effect only on a value made in this very function, not on an argument.
    pointer = address.to(tl.pointer_type(dtype))
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + offsets


@triton.jit
def load_columns(base, columns):
    out = ()
    for i in tl.static_range(len(columns)):
        out = out + (tl.load(base + columns[i]),)
    return out


@triton.jit
def load_device_scalars(row, columns, COMPUTE: tl.constexpr):
    out = ()
    for i in tl.static_range(len(columns)):
        out = out + (tl.load(tl.load(row + columns[i]).to(tl.pointer_type(tl.float64))).to(COMPUTE),)
    return out


@triton.jit
def load_block(address, dtype: tl.constexpr, offsets, mask, WIDE: tl.constexpr, ZEROS: tl.constexpr):
    """ZEROS fills masked lanes with 0, which costs instructions and only reductions need."""
    if ZEROS:
        return tl.load(at_address(address, dtype, offsets, WIDE), mask=mask, other=0)
    else:
        return tl.load(at_address(address, dtype, offsets, WIDE), mask=mask)


@triton.jit
def load_blocks(addresses, dtypes, offsets, mask, WIDE: tl.constexpr, ZEROS: tl.constexpr):
    out = ()
    for i in tl.static_range(len(addresses)):
        out = out + (load_block(addresses[i], dtypes[i], offsets, mask, WIDE, ZEROS),)
    return out


@triton.jit
def load_units(addresses, layout, start, offsets, mask, COMPUTE: tl.constexpr):
    out = ()
    if len(addresses) > 0:
        # 64 bits once, 32 for each element: its division is what a unit costs.
        stride = layout[0].to(tl.int32)
        within = (start % layout[0]).to(tl.int32) + (offsets - start).to(tl.int32)
        unit = ((start // layout[0]) % layout[1]).to(tl.int32) + within // stride
        unit = unit % layout[1].to(tl.int32)
        for i in tl.static_range(len(addresses)):
            out = out + (tl.load(addresses[i].to(tl.pointer_type(COMPUTE)) + unit, mask=mask),)
    return out


@triton.jit
def cast_all(blocks, COMPUTE: tl.constexpr):
    out = ()
    for i in tl.static_range(len(blocks)):
        out = out + (blocks[i].to(COMPUTE),)
    return out


@triton.jit
def store_blocks(addresses, dtypes, blocks, offsets, mask, WIDE: tl.constexpr):
    for i in tl.static_range(len(blocks)):  # buffers that a stage only reads come last
        tl.store(at_address(addresses[i], dtypes[i], offsets, WIDE), blocks[i].to(dtypes[i]), mask=mask)


@triton.jit
def run_stage(
    stage, addresses, arguments, state, p, u, at, offsets, mask, WIDE: tl.constexpr, STORE: tl.constexpr
):
    if stage.momentum:
        # Momentum-SAM: what the last step subtracted is restored, and the new momentum passed on.
        p += arguments[0] * state[0]
        p, u, state = stage.fn(p, u, at, *state, *arguments[1:])
        u = (u, state[0])
    else:
        p, u, state = stage.fn(p, u, at, *state, *arguments)
    if STORE:
        store_blocks(addresses, stage.dtypes, state, offsets, mask, WIDE)
    return p, u


@triton.jit
def run_stages(
    gradient, row, stages, storage, at, start, offsets, mask,
    G: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Returns weight and update of a block after the stages; state is stored if STORE."""
    # All loads are issued before the first use, so that they overlap.
    raw = load_blocks(row.sources, storage.source_dtypes, offsets, mask, WIDE, not STORE)
    u = load_block(gradient, G, offsets, mask, WIDE, not STORE).to(COMPUTE)
    states = ()
    for i in tl.static_range(len(stages)):
        states = states + (load_blocks(row.state[i], stages[i].dtypes, offsets, mask, WIDE, not STORE),)
    p = storage.read(*raw).to(COMPUTE)
    for i in tl.static_range(len(stages)):
        state = cast_all(states[i], COMPUTE)
        arguments = load_units(row.units[i], row.layouts[i], start, offsets, mask, COMPUTE) + row.arguments[i]
        p, u = run_stage(stages[i], row.state[i], arguments, state, p, u, at, offsets, mask, WIDE, STORE)
    return p, u


@triton.jit
def update_block(
    gradient, row, stages, storage, at, start, offsets, mask,
    G: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    p, u = run_stages(gradient, row, stages, storage, at, start, offsets, mask, G, COMPUTE, WIDE, True)
    written = storage.write(p, at, *row.rng_keys)
    store_blocks(row.targets, storage.target_dtypes, written, offsets, mask, WIDE)


@triton.jit
def any_of(addresses):
    out = tl.full((), 0, tl.int64)
    for i in tl.static_range(len(addresses)):
        out = out | addresses[i]
    return out


@triton.jit
def any_state(row):
    out = any_of(row.sources)
    for i in tl.static_range(len(row.state)):
        out = out | any_of(row.state[i])
    return out


@triton.jit
def load_row(row, step_scalars, stages, storage, COMPUTE: tl.constexpr):
    state = ()
    arguments = ()
    units = ()
    layouts = ()
    for i in tl.static_range(len(stages)):
        state = state + (load_columns(row, stages[i].state),)
        units = units + (load_columns(row, stages[i].units),)
        layouts = layouts + (load_columns(row, stages[i].layout),)
        arguments = arguments + (
            load_device_scalars(row, stages[i].device_scalars, COMPUTE)
            + load_columns(row, stages[i].rng_keys)
            + load_columns(step_scalars, stages[i].step_scalars),
        )
    sources = load_columns(row, storage.sources)
    targets = load_columns(row, storage.targets)
    return Row(sources, targets, load_columns(row, storage.rng_keys), state, arguments, units, layouts)


# `stages` and `storage` stay un-annotated: as tl.constexpr, Triton's disk cache would not notice that a
# stage's source was edited and would run the old code.
@triton.jit(do_not_specialize=["skip"])
def step_kernel(
    table, gradients, steps, step_scalars, work, skip, stages, storage,
    G: tl.constexpr, COMPUTE: tl.constexpr, COLUMNS: tl.constexpr, STEP_SCALARS: tl.constexpr,
    RANDOM: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program updates one block of one tensor.

    table         int64[tensors, COLUMNS]        addresses, sizes and integers, see the columns above
    gradients     int64[tensors]                 addresses
    steps         int64[rows]                    step count, for random numbers
    step_scalars  COMPUTE[rows, STEP_SCALARS]    computed by the host for this step
    work          int32[programs, 2]             (tensor, block)
    skip          float64[1] or None             not 0: nothing is read or written
    """
    if skip is not None:
        if tl.load(skip) != 0:
            return
    pid = tl.program_id(0)
    tensor = tl.load(work + 2 * pid)
    start = tl.load(work + 2 * pid + 1).to(tl.int64) * BLOCK
    header = table + tensor.to(tl.int64) * COLUMNS
    first = tl.load(header + FIRST)
    gradient = tl.load(gradients + tensor)
    stream = tl.load(header + STREAM).to(tl.uint32)
    scalar_row = tl.load(header + ROW)
    step = tl.load(steps + scalar_row).to(tl.uint32)
    row = load_row(header, step_scalars + scalar_row * STEP_SCALARS, stages, storage, COMPUTE)
    aligned = (gradient | any_of(row.targets) | any_state(row)) % 16 == 0
    if RANDOM:
        aligned = aligned & (first % 8 == 0)

    # Two loops around one body.  The mask of the wide one is constant over 16 elements, which keeps its
    # accesses 128 bits wide; a plain `offsets < n` would turn them all into scalar ones.
    stop = tl.minimum(tl.load(header + COUNT), start + BLOCK)
    wide = tl.where(aligned, stop // 16 * 16, start)
    for s in range(start, wide, CHUNK):
        offsets = s + tl.arange(0, CHUNK)
        update_block(
            gradient, row, stages, storage, PhiloxPosition(first + s, stream, step, VECTOR), s, offsets,
            offsets < wide, G, COMPUTE, True,
        )  # fmt: skip
    # The narrow one does the rest, and all of a tensor that is misaligned or has a misaligned gradient, such
    # as one in a bucket. A fourth of a chunk keeps enough loads in flight and takes no registers from the
    # wide one; a whole chunk would take 30 to 90.
    lead = 0
    if RANDOM:  # random numbers come in whole groups
        lead = (first + wide) % 8
    for s in range(wide - lead, stop, CHUNK // 4):
        offsets = s + tl.arange(0, CHUNK // 4)
        update_block(
            gradient, row, stages, storage, PhiloxPosition(first + s, stream, step, VECTOR), s, offsets,
            (offsets >= wide) & (offsets < stop), G, COMPUTE, False,
        )  # fmt: skip
