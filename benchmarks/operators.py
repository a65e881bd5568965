"""Lists entries of the code audit for the kernels of dropout, noise and adversarial inputs."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from fastreg.ops import _elementwise as elementwise
from fastreg.ops import adversarial as adversarial_ops
from fastreg.ops import dropout as dropout_ops
from fastreg.ops import noise as noise_ops
from fastreg.reference import adversarial as reference
from fastreg.reference.activations import ACTIVATIONS
from fastreg.runtime.launch_parameters import Architecture, launch_parameters
from fastreg_kernels import adversarial as adversarial_kernels
from fastreg_kernels import dropout as dropout_kernels
from fastreg_kernels import noise as noise_kernels

from .chains import STORAGES
from .entry import Entry

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
"""Budgets in instructions per element on sm_90, in float32 and bfloat16, for any Triton from 3.6 to 3.9."""
FEATURES = 768


def dropout_entries(target: Architecture) -> list[Entry]:
    """Returns the entries of dropout with all functions fused around it."""
    listed = []
    for name, budgets in DROPOUT.items():
        for storage, budget in zip(("fp32", "bf16"), budgets, strict=True):
            listed.append(dropout_entry(name, storage, target, budget))
    return listed


def dropout_entry(name: str, storage: str, target: Architecture, budget: float) -> Entry:
    """Returns the entry of a dropout kernel named by its functions, as in "bias+gelu+dropout backward".

    The bytes of a bias count as read, though it comes from a cache.
    """
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
"""Direction, ball and bounds of a step, and its budgets on sm_90 in float32 and in bfloat16."""
SIZES = {
    "gradient size": ("scaled", False, (7, 7.5)),
    "perturbation size": ("scaled", True, (11.5, 13)),
    "normal noise size": ("normal", False, (None, None)),
    "Laplace noise size": ("laplace", False, (None, None)),
}
"""Direction; whether the norm is of the perturbation after a step along it, not of itself; budgets as above.

Norms of noise have no budget: they are taken once an attack."""


def adversarial_entries(target: Architecture) -> list[Entry]:
    """Returns the entries of adversarial steps, and of the norms that they need.

    Inputs of 16 bits are moved in float32.
    """
    attacks = {name: (kind, name.startswith("PGD"), row) for name, (kind, *_, row) in ADVERSARIAL.items()}
    listed = []
    for name, (kind, behind, budgets) in {**attacks, **SIZES}.items():
        for storage, budget in zip(("fp32", "bf16"), budgets, strict=True):
            dtype, pointer, noise = STORAGES[storage][0], f"*{storage}", kind in reference.NOISES
            itemsize, wide = dtype.itemsize, "*fp32" if behind else pointer
            chosen = launch_parameters(f"adversarial_{'norm' if name in SIZES else 'step'}", target)
            constants: dict[str, Any] = adversarial_ops.constants(kind, chosen, target.lanes)
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
"""Kind, elements of a row if each row has its own size of noise, and budgets as above."""


def noise_entries(target: Architecture) -> list[Entry]:
    """Returns the entries of noise on activations."""
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
