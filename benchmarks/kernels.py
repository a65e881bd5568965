"""Every kernel entry point and shipped chain, with what the code audit compiles it for and holds it to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton.language as tl

from fastreg.engine.batch import NormSpec
from fastreg.engine.launch import triton as launchers
from fastreg.engine.stage import Chain
from fastreg.ops import _elementwise as elementwise
from fastreg.ops import adversarial as adversarial
from fastreg.ops import dropout as dropout_ops
from fastreg.ops import ghost as ghost_ops
from fastreg.ops import noise as noise_ops
from fastreg.ops import per_sample as per_sample_ops
from fastreg.ops.penalty import L1, L2, SUM
from fastreg.reference import adversarial as reference
from fastreg.reference.activations import ACTIVATIONS
from fastreg.runtime.device import H200
from fastreg.runtime.launch_parameters import Architecture, LaunchParameters, launch_parameters
from fastreg_kernels import adversarial as adversarial_kernels
from fastreg_kernels import dropout as dropout_kernels
from fastreg_kernels import ghost as ghost_kernels
from fastreg_kernels import noise as noise_kernels
from fastreg_kernels import norm as norm_kernels
from fastreg_kernels import per_sample as per_sample_kernels
from fastreg_kernels import step as step_kernels
from fastreg_kernels import units as unit_kernels

from .chains import STORAGES, Shipped, momentum_read, moved, rule, shipped


@dataclass(frozen=True)
class Entry:
    """A kernel entry point with the arguments it is compiled for.

    Args:
        name: What the table calls it.
        kernel: The `@triton.jit` function.
        arguments: Types of the run-time arguments by name; tuples of stages as they are.
        constants: Compile-time arguments.
        reads: Bytes read per element.
        writes: Bytes written per element.
        budget: Instructions per element allowed on sm_90; `None` for a kernel that runs once a step.
        gathers: Loads per element that are not wide: of what a unit shares, out of the cache.
        options: How it is compiled.
        multiples: Integers that are multiples of 16, which a launch sees to.
        in_flight: Loads that a thread must have issued before the first is used, on sm_90: of kernels with
            so few programs that nothing else hides how long a load takes.
        program: Elements that a program works on, where the launch says so at run time.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    reads: int = 0
    writes: int = 0
    budget: float | None = None
    gathers: float = 0
    options: dict[str, Any] = field(default_factory=lambda: LaunchParameters(0).options)
    multiples: tuple[str, ...] = ()
    in_flight: int = 0
    program: int = 0

    @property
    def elements(self) -> int:
        """That a program works on; one of a kernel without blocks has at least a chunk."""
        return self.program or self.constants.get("BLOCK", self.constants["CHUNK"])

    @property
    def bytes(self) -> int:
        return self.reads + self.writes


def step_entry(
    name: str, chain: Any, dtypes: tuple[torch.dtype, ...], target: Architecture = H200,
    budget: float | None = None,
) -> Entry:  # fmt: skip
    """The step kernel as the launcher would run it for a chain on tensors of these dtypes."""
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
    """The norm kernel as the launcher would run it; by default it reads gradients alone."""
    stages, storage = launchers.device_chain(chain, dtypes)
    chosen = launch_parameters("norm", target)
    constants = launchers.norm_constants(chain, dtypes, of, chosen, target.lanes)
    arguments = {
        "table": "*i64", "gradients": "*i64", "steps": "*i64", "step_scalars": f"*{constants['COMPUTE']}",
        "work": "*i32", "partial": "*fp64", "turns": "i32", "stages": stages[: of.of(chain)],
        "storage": storage,
    }  # fmt: skip
    reads = dtypes[1].itemsize if reads is None else reads
    options = launchers.options(chain.stages[: of.of(chain)], chosen)
    return Entry(
        name, norm_kernels.norm_kernel, arguments, constants, reads, 0, budget, options=options,
        program=chosen.block,
    )  # fmt: skip


# Instructions per element on sm_90 of norms of what stages make of the gradient, for each of the storages.
MEASURED = {
    "momentum norm, SGD-momentum": (8.5, 9, 10, 9),
    "momentum norm, SGD-momentum-decay": (11, 12.3, 13, 15),
    "momentum norm, AdamW": (8.5, 9, 9.7, 9),
    "adaptive norm": (9.5, None, 10.3, None),
    "noised norm": (59, 59, 59, 59),
}


def _measured(shipped: Shipped) -> tuple[str, NormSpec | None, int]:
    """What a chain takes the norm of besides gradients: its name, the measurand, bytes read per element."""
    parts = shipped.name.split("+")
    if "MSAM" in parts:
        of = NormSpec(momentum=True)
        return f"momentum norm, {rule(shipped.name)}", of, momentum_read(shipped.chain, shipped.dtypes)
    if {"dp", "clip"} <= set(parts):
        return "noised norm", NormSpec(stages=1), shipped.dtypes[1].itemsize
    if shipped.name == "ASAM climb":
        return "adaptive norm", NormSpec(stages=1), sum(d.itemsize for d in shipped.dtypes[:2])
    return "", None, 0


def entries(lanes: int, architecture: str = H200.name) -> list[Entry]:
    """Every entry point, for warps of so many lanes; the step kernel once per shipped chain."""
    target = Architecture(architecture, lanes, H200.multiprocessors)
    chains = list(shipped())
    listed = [step_entry(f"{c.name} {c.storage}", c.chain, c.dtypes, target, c.budget) for c in chains]
    for kind, largest, budgets in (("norm", False, (3.7, 4.3)), ("largest", True, (4.7, 4.8))):
        for name, dtype, budget in zip(
            ("fp32", "bf16"), (torch.float32, torch.bfloat16), budgets, strict=True
        ):
            of = NormSpec(largest=largest)
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
    listed += ghost_entries(target) + per_sample_entries(target) + noise_entries(target)
    return listed + penalty_entries(target) + dropout_entries(target) + adversarial_entries(target)


IN_FLIGHT = 8
"""Loads of a thread that must be under way at a time where there is one program, or one for each sample."""


PER_SAMPLE = {"fp32": (6, 21.5), "bf16": (5, 22.5)}
"""Instructions per element on sm_90 of norms and sum of gradients that are held per sample; a program's own
share of the sum counts as if there were one sample."""


def ghost_entries(target: Architecture) -> list[Entry]:
    """Sums over the positions of each sample, of features that are multiples of 16."""
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


def per_sample_entries(target: Architecture) -> list[Entry]:
    """Clipping of gradients that are held per sample; bytes are those of one sample."""

    def arguments(name: str, count: str) -> dict[str, Any]:
        return {"table": "*i64", "work": "*i32", name: "*fp64", count: "i32"}

    chosen = [launch_parameters(f"per_sample_{part}", target) for part in ("norm", "sum", "factor")]
    listed = []
    for storage, budgets in PER_SAMPLE.items():
        dtype = STORAGES[storage][0]
        norm, total = per_sample_kernels.per_sample_norm_kernel, per_sample_kernels.per_sample_sum_kernel
        constants = (
            per_sample_ops.norm_constants(dtype, chosen[0], target.lanes),
            per_sample_ops.sum_constants(dtype, torch.float32, False, chosen[1], target.lanes),
        )
        listed += [
            Entry(
                f"per-sample norm {storage}", norm, arguments("partial", "blocks"), constants[0],
                dtype.itemsize, 0, budgets[0], options=chosen[0].options,
            ),
            Entry(  # a factor for all that a thread has of a sample
                f"per-sample sum {storage}", total, arguments("factors", "samples"), constants[1],
                dtype.itemsize, 0, budgets[1], gathers=1 / chosen[1].per_thread, options=chosen[1].options,
            ),
        ]  # fmt: skip
    finish = {
        "partial": "*fp64", "segments": "*i64", "limits": "*fp64", "norms": "*fp64", "factors": "*fp64",
        "blocks": "i32", "samples": "i32",
    }  # fmt: skip
    kernel, constants = per_sample_kernels.per_sample_factor_kernel, {"BLOCK": chosen[2].block}
    options = chosen[2].options
    return [
        *listed,
        Entry("per-sample factors", kernel, finish, constants, options=options, in_flight=IN_FLIGHT),
    ]


PENALTIES = {"L2": (L2, 6.2, 6.7), "L1": (L1, 10.5, 10)}
"""Chains of the gradients, and their instructions per element on sm_90, in float32 and in bfloat16."""


def penalty_entries(target: Architecture) -> list[Entry]:
    """Sums of magnitudes, where those of squares are the norm's, and the gradients of both penalties."""
    listed = []
    for storage, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        of = NormSpec(absolute=True)
        listed.append(norm_entry(f"magnitudes {storage}", SUM, (dtype, dtype), of, target, 4.8))
        for name, (chain, *budgets) in PENALTIES.items():
            entry = step_entry(f"{name} penalty gradient {storage}", chain, (dtype, dtype), target)
            budget = budgets[dtype == torch.bfloat16]
            # The place of a gradient is only written, and what a chain calls its gradient is the weight.
            listed.append(replace(entry, reads=dtype.itemsize, writes=dtype.itemsize, budget=budget))
    return listed


DROPOUT = {
    "dropout": (15, 15),
    "dropout+add": (18, 18),
    "bias+dropout+add": (22, 22),
    "bias+relu+dropout": (22, 22),
    "bias+silu+dropout+add": (33, 34),
    "bias+gelu_tanh+dropout+add": (35, 36),
    "bias+gelu+dropout": (33, 33),
    "bias+gelu+dropout+add": (36, 36),
    "bias+relu+dropout backward": (24, 24),
    "bias+silu+dropout backward": (36, 36),
    "bias+gelu_tanh+dropout backward": (40, 41),
    "bias+gelu+dropout backward": (40, 40),
    "dropout, a rate for each channel": (34, 34),
}
"""Instructions per element on sm_90, in float32 and in bfloat16, with any Triton from 3.6 to 3.9."""
FEATURES = 768


def dropout_entries(target: Architecture) -> list[Entry]:
    """Dropout and what is fused around it."""
    listed = []
    for name, budgets in DROPOUT.items():
        for storage, budget in zip(("fp32", "bf16"), budgets, strict=True):
            listed.append(dropout_entry(name, storage, target, budget))
    return listed


def dropout_entry(name: str, storage: str, target: Architecture, budget: float) -> Entry:
    """A kernel of dropout by what it does, such as "bias+gelu+dropout backward"; a bias is cached."""
    what, backward = name.removesuffix(" backward"), name.endswith(" backward")
    parts, channels = what.split("+"), name.endswith("channel")
    dtype = STORAGES[storage][0]
    activation = next((part for part in parts if part in ACTIVATIONS), "identity")
    drop_thresholds = torch.zeros(FEATURES if channels else (), dtype=torch.int32)
    bias = torch.zeros(FEATURES) if "bias" in parts else None
    chosen = launch_parameters("dropout", target)
    constants = elementwise.constants(
        dropout_ops.DROPOUT, (bias, drop_thresholds), 1, (activation,), dtype, chosen, target.lanes
    )
    constants["ACTIVATION"] = tl.constexpr(activation)
    pointer = f"*{storage}"
    arguments = {
        "x": pointer, "bias": pointer if "bias" in parts else None,
        "residual": pointer if "add" in parts else None, "gradient": pointer if backward else None,
        "out": pointer, "seed": "*i64", "drop_thresholds": "*i32", "n": "i32", "inner": "i32",
        "turns": "i32",
    }  # fmt: skip
    kernel = dropout_kernels.dropout_kernel
    reads = dtype.itemsize * (1 + backward + ("bias" in parts) + ("add" in parts)) + 4 * channels
    return Entry(
        f"{name} {storage}", kernel, arguments, constants, reads, dtype.itemsize, budget,
        options=chosen.options, program=chosen.block,
    )  # fmt: skip


ADVERSARIAL = {
    "FGSM": ("sign", "none", "scalar", (12, 28)),
    "FGSM, L2": ("scaled", "none", "scalar", (11, 28)),
    "PGD": ("sign", "linf", "scalar", (17, 37)),
    "PGD, bounds of each channel": ("sign", "linf", "table", (52, 73)),
    "PGD, L2": ("scaled", "l2", "scalar", (14, 35)),
    "PGD, L1, projection": ("none", "l1", "scalar", (15, 34.5)),
    "FGSM, L1, steepest": ("peak", "none", "none", (13, 27.5)),
    "random start": ("uniform", "none", "scalar", (23.5, 44.5)),
    "random start, L2": ("normal", "none", "scalar", (44.5, 66)),
}
"""Direction, ball and bounds of a step; instructions per element on sm_90, in float32 and in bfloat16."""
SIZES = {
    "gradient size": ("scaled", False, (7, 7.5)),
    "perturbation size": ("scaled", True, (11.5, 13)),
    "normal noise size": ("normal", False, (None, None)),
    "Laplace noise size": ("laplace", False, (None, None)),
}
"""What norms are taken of, whether behind a step, and the same; of noise they are taken once an attack."""


def adversarial_entries(target: Architecture) -> list[Entry]:
    """Steps of adversarial inputs, and the norms that they need; inputs of 16 bits move in float32."""
    attacks = {name: (kind, name.startswith("PGD"), row) for name, (kind, *_, row) in ADVERSARIAL.items()}
    listed = []
    for name, (kind, behind, budgets) in {**attacks, **SIZES}.items():
        for storage, budget in zip(("fp32", "bf16"), budgets, strict=True):
            dtype, pointer, noise = STORAGES[storage][0], f"*{storage}", kind in reference.NOISES
            itemsize, wide = dtype.itemsize, "*fp32" if behind else pointer
            chosen = launch_parameters(f"adversarial_{'norm' if name in SIZES else 'step'}", target)
            constants: dict[str, Any] = adversarial.constants(kind, chosen, target.lanes)
            seed, gradient, clean = ("*i64", None, None) if noise else (None, pointer, None)
            if kind == "none":
                gradient = None
            reads, writes = itemsize * (gradient is not None) + (itemsize + 4) * behind, 0
            if behind:
                clean = pointer
            if name in SIZES:
                kernel = adversarial_kernels.adversarial_norm_kernel
                arguments = {
                    "x": wide, "gradient": gradient, "clean": clean, "partial": "*fp64",
                    "step_scalars": "*fp32", "seed": seed, "row_stride": "i32", "inner": "i32",
                    "blocks": "i32",
                }  # fmt: skip
                constants["SQUARES"] = kind != "laplace"
                gathers = 0
            else:
                kernel = adversarial_kernels.adversarial_step_kernel
                _, constants["BALL"], constants["BOUNDS"], _ = ADVERSARIAL[name]
                limit = None if constants["BOUNDS"] == "none" else pointer
                kept = storage == "bf16" and (behind or noise)
                arguments = {
                    "tensors": (wide, gradient, clean, pointer, "*fp32" if kept else None),
                    "step_scalars": "*fp32", "peaks": "*i64" if kind == "peak" else None, "lower": limit,
                    "upper": limit, "seed": seed, "row_stride": "i32", "inner": "i32", "blocks": "i32",
                    "spatial": "i32", "channels": "i32",
                }  # fmt: skip
                gathers = 2 * (constants["BOUNDS"] == "table")
                reads, writes = reads + itemsize * (not behind), itemsize + 4 * kept
            text = {key: tl.constexpr(value) for key, value in constants.items() if isinstance(value, str)}
            listed.append(
                Entry(
                    f"{name} {storage}",
                    kernel,
                    arguments,
                    constants | text,
                    reads,
                    writes,
                    budget,
                    gathers,
                    options=chosen.options,
                )
            )
    return listed


NOISE = {
    "additive noise": ("additive", None, (37.5, 40.5)),
    "multiplicative noise": ("multiplicative", None, (38.5, 41.5)),
    "uniform noise": ("uniform", None, (12, 14)),
    "uniform noise, a size for each row": ("uniform", FEATURES, (22, 22)),
    "uniform noise, a size for each tiny row": ("uniform", 3, (34.5, 37)),
}
"""Kind, elements of a row that has a size of its own, and instructions per element on sm_90 in float32 and in
bfloat16."""


def noise_entries(target: Architecture) -> list[Entry]:
    """Noise on activations."""
    listed = []
    for name, (kind, inner, budgets) in NOISE.items():
        for storage, budget in zip(("fp32", "bf16"), budgets, strict=True):
            size, scale = STORAGES[storage][0].itemsize, torch.zeros(2 if inner else ())
            chosen = launch_parameters("noise", target)
            dtype = STORAGES[storage][0]
            constants = elementwise.constants(
                noise_ops.NOISE, (scale,), inner or 1, (kind,), dtype, chosen, target.lanes
            )
            gathers = 0 if inner is None else 1 / constants["VECTOR"] if constants["GROUPED"] else 1
            constants["KIND"] = tl.constexpr(kind)
            arguments = {
                "x": f"*{storage}", "out": f"*{storage}", "seed": "*i64", "scales": "*fp32", "n": "i32",
                "inner": "i32", "turns": "i32",
            }  # fmt: skip
            kernel = noise_kernels.noise_kernel
            listed.append(
                Entry(
                    f"{name} {storage}",
                    kernel,
                    arguments,
                    constants,
                    size,
                    size,
                    budget,
                    gathers,
                    options=chosen.options,
                    program=chosen.block,
                )
            )
    return listed
