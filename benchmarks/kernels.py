"""Lists every kernel entry point and shipped chain, with arguments and budgets for the code audit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton.language as tl

from fastreg.engine.batch import NormSpec
from fastreg.engine.launch import triton as launchers
from fastreg.engine.stage import Chain
from fastreg.ops import ghost as ghost_ops
from fastreg.ops.penalty import L1, L2, SUM
from fastreg.runtime.device import H200
from fastreg.runtime.launch_parameters import Architecture, launch_parameters
from fastreg_kernels import ghost as ghost_kernels
from fastreg_kernels import norm as norm_kernels
from fastreg_kernels import step as step_kernels
from fastreg_kernels import units as unit_kernels

from .chains import STORAGES, Shipped, momentum_read, moved, rule, shipped
from .entry import Entry
from .operators import adversarial_entries, dropout_entries, noise_entries


def step_entry(
    name: str, chain: Any, dtypes: tuple[torch.dtype, ...], target: Architecture = H200,
    budget: float | None = None,
) -> Entry:  # fmt: skip
    """Returns the step kernel with the arguments of a launch for a chain and dtypes."""
    stages, storage = launchers.device_chain(chain, dtypes)
    chosen = launch_parameters("step", target)
    constants = launchers.step_constants(chain, dtypes, chosen, target.lanes)
    arguments = {
        "table": "*i64", "gradients": "*i64", "steps": "*i64", "step_scalars": f"*{constants['COMPUTE']}",
        "work": "*i32", "skip": "*fp64", "stages": stages, "storage": storage,
    }  # fmt: skip
    return Entry(
        name, step_kernels.step_kernel, arguments, constants, *moved(chain, dtypes), budget,
        gathers=len(chain.units), options=launchers.options(chain.stages, chosen),
    )  # fmt: skip


def norm_entry(
    name: str, chain: Chain, dtypes: tuple[torch.dtype, ...], of: NormSpec,
    target: Architecture, budget: float | None, reads: int | None = None,
) -> Entry:  # fmt: skip
    """Returns the norm kernel with the arguments of a launch; by default it reads gradients only."""
    stages, storage = launchers.device_chain(chain, dtypes)
    chosen = launch_parameters("norm", target)
    constants = launchers.norm_constants(chain, dtypes, of, chosen, target.lanes)
    constants["KIND"] = tl.constexpr(of.kind)  # a bare string would be taken for a type
    arguments = {
        "table": "*i64", "gradients": "*i64", "steps": "*i64", "step_scalars": f"*{constants['COMPUTE']}",
        "work": "*i32", "partial": "*fp64", "turns": "i32", "stages": stages[: of.num_stages(chain)],
        "storage": storage,
    }  # fmt: skip
    reads = dtypes[1].itemsize if reads is None else reads
    options = launchers.options(chain.stages[: of.num_stages(chain)], chosen)
    return Entry(
        name, norm_kernels.norm_kernel, arguments, constants, reads, 0, budget, options=options,
        program=chosen.block,
    )  # fmt: skip


# Instructions per element on sm_90 of norms of values that stages compute from the gradient, for each of the
# storages.
MEASURED = {
    "momentum norm, SGD-momentum": (8.5, 9, 10, 9),
    "momentum norm, SGD-momentum-decay": (11, 12.3, 13, 15),
    "momentum norm, AdamW": (8.5, 9, 9.7, 9),
    "adaptive norm": (9.5, None, 10.3, None),
    "noised norm": (59, 59, 59, 59),
}


def _measured(shipped: Shipped) -> tuple[str, NormSpec | None, int]:
    """Returns the norm that a chain takes of other values than gradients: name, spec, bytes per element."""
    parts = shipped.name.split("+")
    if "MSAM" in parts:
        of = NormSpec(kind="momentum")
        return f"momentum norm, {rule(shipped.name)}", of, momentum_read(shipped.chain, shipped.dtypes)
    if {"dp", "clip"} <= set(parts):
        return "noised norm", NormSpec(stages=1), shipped.dtypes[1].itemsize
    if shipped.name == "ASAM climb":
        return "adaptive norm", NormSpec(stages=1), sum(d.itemsize for d in shipped.dtypes[:2])
    return "", None, 0


def entries(lanes: int, architecture: str = H200.name) -> list[Entry]:
    """Returns every entry point for an architecture with `lanes` threads in a warp.

    The step kernel has an entry for each shipped chain.
    """
    target = Architecture(architecture, lanes, H200.multiprocessors)
    chains = list(shipped())
    listed = [step_entry(f"{c.name} {c.storage}", c.chain, c.dtypes, target, c.budget) for c in chains]
    for kind, largest, budgets in (("norm", False, (3.7, 4.3)), ("largest", True, (4.7, 4.8))):
        for name, dtype, budget in zip(
            ("fp32", "bf16"), (torch.float32, torch.bfloat16), budgets, strict=True
        ):
            of = NormSpec(kind="largest" if largest else "l2")
            listed.append(norm_entry(f"{kind} {name}", Chain(()), (dtype, dtype), of, target, budget))
    for c in chains:
        kind, of, read = _measured(c)
        if of:
            name, budget = f"{kind} {c.storage}", MEASURED[kind][list(STORAGES).index(c.storage)]
            listed.append(norm_entry(name, c.chain, c.dtypes, of, target, budget, read))
    adaptive = next(c for c in chains if c.chain.units)
    arguments = {"table": "*i64", "gradients": "*i64", "work": "*i32"}
    for dtype, name, budget in ((torch.float32, "fp32", 19), (torch.bfloat16, "bf16", 21)):
        chosen = launch_parameters("unit_squares", target)
        units = launchers.unit_constants(adaptive.chain, (dtype, dtype), chosen, target.lanes)
        kernel, read = unit_kernels.unit_squares_kernel, 2 * dtype.itemsize
        sums = {**arguments, "out": f"*{units['COMPUTE']}"}
        listed.append(
            Entry(f"unit squares {name}", kernel, sums, units, read, 0, budget, options=chosen.options)
        )
    chosen = launch_parameters("clip_factor", target)
    finish = {"partial": "*fp64", "count": "i32", "limits": "*fp64", "out": "*fp64"}
    constants = {"LARGEST": False, "BLOCK": chosen.block}
    kernel = norm_kernels.clip_factor_kernel
    listed.append(
        Entry("clip factor", kernel, finish, constants, options=chosen.options, in_flight=IN_FLIGHT)
    )
    listed += ghost_entries(target) + noise_entries(target)
    return listed + penalty_entries(target) + dropout_entries(target) + adversarial_entries(target)


IN_FLIGHT = 8
"""Fewest loads that a thread must have in flight in a kernel that is launched as a single program."""


def ghost_entries(target: Architecture) -> list[Entry]:
    """Returns the kernels that sum over positions of each sample, for numbers of features divisible by 16."""
    listed = []
    for storage in ("fp32", "bf16"):
        pointer, dtype = f"*{storage}", STORAGES[storage][0]
        tiles = {
            "left": pointer, "right": pointer, "partial": "*fp32", "samples": "i32", "positions": "i32",
            "p": "i32", "d": "i32",
        }  # fmt: skip
        sums = {"grad": pointer, "x": pointer, "weight": "*fp32", "bias": "*fp32"}
        rows = {"mean": "*fp32", "deviation": "*fp32", "positions": "i32", "features": "i32"}
        chosen = launch_parameters("ghost_sums", target)
        constants = ghost_ops.ghost_constants(dtype, chosen)
        constants["PRECISION"] = tl.constexpr(constants["PRECISION"])
        kernel, divisible = ghost_kernels.ghost_sums_kernel, ("p", "d")
        listed.append(
            Entry(
                f"ghost sums {storage}",
                kernel,
                tiles,
                constants,
                options=chosen.options,
                multiples=divisible,
            )  # fmt: skip
        )
        kernel, ordered = ghost_kernels.sample_sums_kernel, ghost_kernels.sample_sums_kernel.arg_names
        arguments = {name: (sums | rows)[name] for name in ordered if name in sums | rows}
        chosen = launch_parameters("sample_sums", target)
        listed.append(
            Entry(
                f"sample sums {storage}", kernel, arguments, ghost_ops.sample_constants(chosen),
                options=chosen.options, multiples=("features",),
            )
        )  # fmt: skip
    return listed


PENALTIES = {"L2": (L2, 6.2, 6.7), "L1": (L1, 10.5, 10)}
"""Chain of each penalty's gradient, and its instructions per element on sm_90, in float32 and bfloat16."""


def penalty_entries(target: Architecture) -> list[Entry]:
    """Returns the kernels for the sum of magnitudes and for the gradients of both penalties.

    The sum of squares is the kernel of the L2 norm, which is listed already.
    """
    listed = []
    for storage, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        of = NormSpec(kind="absolute")
        listed.append(norm_entry(f"magnitudes {storage}", SUM, (dtype, dtype), of, target, 4.8))
        for name, (chain, *budgets) in PENALTIES.items():
            entry = step_entry(f"{name} penalty gradient {storage}", chain, (dtype, dtype), target)
            budget = budgets[dtype == torch.bfloat16]
            # The chain takes the weight as gradient, and only writes its parameter: the penalty's gradient.
            listed.append(replace(entry, reads=dtype.itemsize, writes=dtype.itemsize, budget=budget))
    return listed
