"""Times a few launch parameters of each kernel, and writes the line to change if one of them is faster.

A setting wins only if its gain is larger than the differences between rounds of the same setting.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastreg
from fastreg.adversarial.ball import Ball
from fastreg.nn import rates
from fastreg.ops import dropout as dropout_ops
from fastreg.ops import ghost as ghost_ops
from fastreg.ops import noise as noise_ops
from fastreg.runtime import device
from fastreg.runtime.launch_parameters import Architecture, LaunchParameters, launch_parameters, trying

from . import chains, measure, shapes
from .ledger import Ledger, Row, failed

MOST = 6
"""Most settings of a kernel, with the one in use."""
BETTER = 0.02
"""Least gain of a winner, as a share of the time: rounds of the same setting differ by about as much."""
Make = Callable[[torch.device, bool], tuple[Callable[[], Any], int]]


@dataclass(frozen=True)
class Trial:
    """A kernel, the workload that times it, and the settings to try.

    Args:
        kernel: Name of the kernel in the table of launch parameters.
        make: Takes a device, and whether it is a dry run, which is small.  Returns a run and the bytes that
            it must move; the run returns its results, as tensors in sequences and mappings.
        changes: Changes to the parameters in use, for each setting.
    """

    kernel: str
    make: Make
    changes: tuple[dict[str, int], ...]


def _step(chain: str, storage: str, where: torch.device, dry: bool) -> tuple[Callable[[], Any], int]:
    sizes = [(300, 5)] if dry else shapes.gpt2()
    dtype, bf16, state_dtype = chains.STORAGES[storage]
    params = [torch.nn.Parameter(torch.randn(size, device=where, dtype=dtype)) for size in sizes]
    for p in params:
        p.grad = torch.randn_like(p)
    made = chains.optimizer(chain, params, lr=0.1, seed=0, bf16=bf16, state_dtype=state_dtype)

    def run() -> list[Any]:
        made.step()
        return [params, made.state]

    return run, sum(p.numel() for p in params) * chains.at(chain, storage).bytes


def _norm(where: torch.device, dry: bool) -> tuple[Callable[[], Any], int]:
    params = [torch.nn.Parameter(torch.randn(s, device=where)) for s in ([(99,)] if dry else shapes.gpt2())]
    return lambda: fastreg.l2_penalty(params, 0.1), 4 * sum(p.numel() for p in params)


def _partials(where: torch.device, dry: bool) -> tuple[Callable[[], Any], int]:
    """Returns a run on as many partial sums as the norm of 7 G parameters has, and its bytes."""
    from fastreg.engine.launch.triton import clip_factor

    partial = torch.rand(100 if dry else 430_000, dtype=torch.float64, device=where)
    limits = torch.ones(2, dtype=torch.float64, device=where)
    return lambda: clip_factor(partial, limits, False), 8 * len(partial)


def _activations(dry: bool, where: torch.device, large: bool) -> Tensor:
    elements = 2**12 if dry else 2**28 if large else 8 * 1024 * 768
    return torch.randn(elements, device=where, dtype=torch.bfloat16)


def _dropout(large: bool, where: torch.device, dry: bool) -> tuple[Callable[[], Any], int]:
    x, seed, drop_threshold = (
        _activations(dry, where, large),
        torch.tensor(7, device=where),
        rates.drop_thresholds(0.1, where),
    )
    return lambda: dropout_ops.dropout(x, seed, drop_threshold, 1, None), 4 * x.numel()


def _noise(where: torch.device, dry: bool) -> tuple[Callable[[], Any], int]:
    x, seed, one = (
        _activations(dry, where, True),
        torch.tensor(7, device=where),
        torch.tensor(0.1, device=where),
    )
    return lambda: noise_ops.noise(x, seed, one, 1, "additive"), 4 * x.numel()


def _adversarial(where: torch.device, dry: bool) -> tuple[Callable[[], Any], int]:
    x = torch.rand(2 if dry else 256, 3, 8 if dry else 224, 8 if dry else 224, device=where)
    ball, gradient = Ball(x, 0.1, "linf", (0.0, 1.0)), torch.randn_like(x)
    _, point = ball.start(torch.tensor(7, device=where))
    return lambda: ball.step(point, gradient, ball.epsilon), 16 * x.numel()


def _ghost(dtype: torch.dtype, where: torch.device, dry: bool) -> tuple[Callable[[], Any], int]:
    left, right = (
        torch.randn(2 if dry else 16, 9 if dry else 1024, 5 if dry else features, device=where, dtype=dtype)
        for features in (768, 3072)
    )
    return lambda: ghost_ops.ghost_sums(left, right), (left.numel() + right.numel()) * dtype.itemsize


def _sums(where: torch.device, dry: bool) -> tuple[Callable[[], Any], int]:
    grad, x = (
        torch.randn(2 if dry else 32, 9 if dry else 1024, 5 if dry else 768, device=where) for _ in range(2)
    )
    return lambda: ghost_ops.sample_sums(grad, x), 8 * x.numel()


WIDER = ({"block": 8192}, {"warps": 8}, {"block": 8192, "warps": 8}, {"block": 16384, "warps": 8})
TRIALS = {
    "norm": Trial(
        "norm", _norm,
        ({"block": 4096}, {"block": 8192}, {"block": 32768}, {"warps": 8}, {"block": 32768, "warps": 8}),
    ),
    "step, AdamW fp32": Trial("step", functools.partial(_step, "AdamW", "fp32"), (*WIDER, {"warps": 2})),
    "step, clip+noise+AdamW+EMA bf16": Trial(
        "step", functools.partial(_step, "clip+noise+AdamW+EMA", "bf16"), (*WIDER, {"warps": 2}),
    ),
    "clip factor": Trial(
        "clip_factor", _partials, ({"block": 4096}, {"warps": 32}, {"block": 16384, "warps": 32}),
    ),
    "dropout, 256 M bf16": Trial(
        "dropout", functools.partial(_dropout, True),
        ({"block": 4096}, {"block": 8192}, {"per_thread": 8}, {"warps": 8}, {"block": 32768}),
    ),
    "dropout, 6 M bf16": Trial(
        "dropout", functools.partial(_dropout, False),
        ({"least": 4096}, {"least": 16384}, {"per_thread": 8, "least": 1024}),
    ),
    "noise, 256 M bf16": Trial(
        "noise", _noise, ({"block": 4096}, {"block": 8192}, {"per_thread": 8}, {"warps": 8}),
    ),
    "PGD step": Trial(
        "adversarial_step", _adversarial,
        ({"block": 4096}, {"block": 16384}, {"per_thread": 8}, {"warps": 8}),
    ),
    "ghost norms bf16": Trial(
        "ghost_sums", functools.partial(_ghost, torch.bfloat16),
        ({"depth": 16}, {"depth": 64}, {"warps": 4}, {"stages": 4}, {"block": 128}),
    ),
    "ghost norms fp32": Trial(
        "ghost_sums", functools.partial(_ghost, torch.float32), ({"depth": 16}, {"warps": 4}, {"stages": 2}),
    ),
    "sums over positions": Trial(
        "sample_sums", _sums, ({"depth": 32}, {"block": 64, "depth": 32}, {"block": 256}, {"warps": 8}),
    ),
}  # fmt: skip
"""Trials by name, the most important first."""


def run(ledger: Ledger, where: str, dry: bool) -> bool:
    """Runs all trials; returns whether none failed and all settings gave the same results."""
    target = device.architecture(torch.device(where))
    names = ["dropout, 6 M bf16"] if dry else list(TRIALS)
    for name in ledger.pending(names):
        row = ledger.attempt(name, functools.partial(tried, TRIALS[name], torch.device(where), target, dry))
        print(f"{name}: {row.get('failed') or row.get('wrong') or row.get('line') or 'as it is'}", flush=True)
    return not any(map(failed, ledger.rows.values()))


def settings(trial: Trial, target: Architecture) -> list[LaunchParameters]:
    """Returns the setting in use on an architecture, then the others to try, `MOST` in all."""
    now = launch_parameters(trial.kernel, target)
    return [now, *(now._replace(**change) for change in trial.changes)][:MOST]


def tried(trial: Trial, where: torch.device, target: Architecture, dry: bool) -> Row:
    """Returns a row with the times of every setting, in milliseconds.

    If a setting wins, the row has the line for the table of launch parameters.  Settings that do not compile
    or need more memory than there is are refused.  If results of a setting differ from those of the setting
    in use, it is not timed, and the row is wrong.
    """
    now, *others = settings(trial, target)
    expected = results(trial, now, where, dry)
    run, moved = trial.make(where, dry)
    runs: dict[str, measure.Run] = {_describe(now): functools.partial(with_setting, trial.kernel, now, run)}
    refused: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for setting in others:
        try:
            outputs = results(trial, setting, where, dry)
        except Exception as error:  # such as more shared memory than there is
            refused[_describe(setting)] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        if differs := _difference(outputs, expected):
            wrong[_describe(setting)] = differs
        else:
            runs[_describe(setting)] = functools.partial(with_setting, trial.kernel, setting, run)
    if not dry:
        runs["copy"] = measure.copy(where)
    timings = measure.interleave(runs, 2 if dry else 25, measure.Clock(where))
    rows = {name: measure.quantiles(timing.seconds) for name, timing in timings.items()}
    copied = rows.pop("copy", None)
    best = min(rows, key=lambda name: rows[name]["median"])
    gain = 1 - rows[best]["median"] / rows[_describe(now)]["median"]
    row: Row = {"ms": rows, "refused": refused, "best": best, "gain": gain, "bytes": moved}
    if wrong:
        row["wrong"] = wrong
    if copied:
        row["of_copy"] = (moved / rows[best]["median"]) / (2 * measure.COPIED / copied["median"])
    if gain > BETTER:
        row["line"] = f'MEASURED["{target.name}"]["{trial.kernel}"] = {best}'
    return row


def results(trial: Trial, setting: LaunchParameters, where: torch.device, dry: bool) -> list[Tensor]:
    """Returns the results of a first run with a setting, from the same random numbers every time."""
    torch.manual_seed(0)
    run, _ = trial.make(where, dry)
    with trying(trial.kernel, setting):
        return _tensors(run())


def _tensors(value: Any) -> list[Tensor]:
    """Returns all tensors in the results of a run."""
    if isinstance(value, Tensor):
        return [value.detach()]
    parts = list(value.values()) if isinstance(value, Mapping) else value
    return [t for part in parts for t in _tensors(part)] if isinstance(parts, (list, tuple)) else []


def _difference(actual: list[Tensor], expected: list[Tensor]) -> str:
    """Returns how far results differ, as text; empty if it is no more than rounding."""
    for one, other in zip(actual, expected, strict=True):
        rounding = torch.finfo(one.dtype).eps if one.is_floating_point() else 0.0
        one, other = one.float(), other.float()
        if not torch.allclose(one, other, rtol=max(1e-3, rounding), atol=1e-5):
            return f"off by {float((one - other).abs().max()):.1e}"
    return ""


def with_setting(kernel: str, setting: LaunchParameters, run: Callable[[], Any]) -> None:
    """Runs a function with other launch parameters for a kernel."""
    with trying(kernel, setting):
        run()


def _describe(setting: LaunchParameters) -> str:
    """Returns the code of a setting, as in the table of launch parameters."""
    names = LaunchParameters._field_defaults
    parts = [
        f"{name}={value}"
        for name, value in setting._asdict().items()
        if name != "block" and value != names[name]
    ]
    return f"LaunchParameters({', '.join([str(setting.block), *parts])})"
