"""What `fastreg compare` says at the end: a table, a verdict for each contender, and everything as JSON."""

from __future__ import annotations

import argparse
import math
import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import backend
from . import document
from .measure import PeakMemory
from .text import Task
from .training import QUANTILE, Record, quantile

SLIGHT = 0.005
"""Differences below this share of the baseline's loss are never called one."""


SLIGHT_TIME = 0.05
"""Differences below this share of the baseline's step time are within what a busy machine adds."""


@dataclass(frozen=True)
class Verdict:
    """Whether a contender helped; `outcome` is helped, hurt, no clear difference, diverged or stopped."""

    label: str
    outcome: str
    sentence: str
    gain: float = 0.0


def baseline(records: list[Record]) -> Record:
    """What the others are compared with: plain, else torch, else the first."""
    named = {record.label: record for record in records}
    return named.get("plain") or named.get("torch") or records[0]


def verdicts(records: list[Record]) -> list[Verdict]:
    """One for each contender but the baseline."""
    if not records:
        return []
    base = baseline(records)
    return [_verdict(record, base) for record in records if record is not base]


def _verdict(record: Record, base: Record) -> Verdict:
    for which in (record, base):
        if not which.finished:
            return Verdict(
                record.label, "stopped", f"no verdict: {which.label} was stopped at step {which.steps[-1]}"
            )
        if which.diverged:
            return Verdict(
                record.label, "diverged", f"no verdict: {which.label} diverged by step {which.steps[-1]}"
            )
    loss, reference = record.losses[1], base.losses[1]
    gain, best_gain = reference - loss, base.validation[base.best] - record.validation[record.best]
    clear = max(2 * math.hypot(scatter(record), scatter(base)), SLIGHT * reference)
    cost = _cost(record, base)
    if abs(gain) < clear:
        sentence = f"val loss {loss:.2f} against {reference:.2f}, within the scatter of ±{clear:.2f}; {cost}"
        return Verdict(record.label, "no clear difference", sentence, gain)
    way = "below" if gain > 0 else "above"
    sentence = f"val loss {loss:.2f}, {abs(gain):.2f} ({abs(gain) / reference:.0%}) {way} {base.label}"
    if gain > 0:
        ahead = (
            "ahead at the best step, too"
            if best_gain > clear
            else f"no better than stopping {base.label} early"
        )
        sentence += (
            f"; {ahead} ({record.validation[record.best]:.2f} against {base.validation[base.best]:.2f})"
        )
    return Verdict(record.label, "helped" if gain > 0 else "hurt", f"{sentence}; {cost}", gain)


def scatter(record: Record) -> float:
    """Standard deviation of the second half of the validation curve around a smooth one.

    From second differences, which a linear trend leaves at zero and independent noise at √6 times its own.
    """
    tail = record.validation[len(record.validation) // 2 :]
    bends = [a - 2 * b + c for a, b, c in zip(tail, tail[1:], tail[2:], strict=False)]
    return math.sqrt(sum(bend * bend for bend in bends) / (6 * len(bends))) if bends else 0.0


def _cost(record: Record, base: Record) -> str:
    more = record.step_time - base.step_time
    if abs(more) < SLIGHT_TIME * base.step_time:
        return f"step time about the same ({more / base.step_time:+.0%})"
    return f"{1e3 * more:+.1f} ms per step ({more / base.step_time:+.0%})"


def headline(records: list[Record]) -> tuple[str, str]:
    """The finding in two lines: what happens to the baseline, and what helps."""
    if not records:
        return "", ""
    base = baseline(records)
    last, best = base.validation[-1], base.validation[base.best]
    if last - best > max(2 * scatter(base), SLIGHT * best):
        first = (
            f"{base.label} overfits: its validation loss turns at step {base.steps[base.best]} "
            f"and rises from {best:.2f} to {last:.2f}"
        )
    else:
        verb = "ends" if base.finished else "was stopped"
        first = f"{base.label} {verb} at a validation loss of {last:.2f}"
    minus = "\N{MINUS SIGN}"
    helpers = sorted(
        (verdict for verdict in verdicts(records) if verdict.outcome == "helped"), key=lambda v: -v.gain
    )
    second = "helped: " + ", ".join(f"{v.label} {minus}{v.gain:.2f}" for v in helpers) if helpers else ""
    return first, second


def heading(task: Task, args: argparse.Namespace) -> str:
    """What is about to be trained, on what and how."""
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    shares = f"{len(task.train):,} tokens to train, {task.validation.numel():,} to validate"
    batch = f"{args.batch_size} x {args.block_size} tokens"
    return (
        f"[bold]{escape(task.model_name)}[/] ({parameters:,} parameters)\n"
        f"{escape(task.text_name)}: {shares}\n"
        f"{args.steps} steps of {batch}, lr {args.lr:g}, seed {args.seed}; "
        f"{_device_name(args.device)}, fastreg backend {backend_name(task, args)}\n"
    )


def show(console: Console, records: list[Record], memory: str) -> None:
    """Print the table and the verdicts."""
    if not records:
        return
    console.print(_table(records))
    notes = [f"* stopped, losses of step {record.steps[-1]}" for record in records if not record.finished]
    notes += ["losses in nats per token", f"times of undisturbed steps ({QUANTILE:.0%} quantile)", memory]
    console.print("; ".join(notes) + "\n", style="dim", highlight=False)
    console.print(f"[bold]{headline(records)[0]}[/]", highlight=False)
    colours = {"helped": "green", "hurt": "red", "diverged": "red"}
    lines = Table.grid(padding=(0, 2))
    lines.add_column(overflow="fold")
    lines.add_column(no_wrap=True)
    for verdict in verdicts(records):
        outcome = f"[{colours.get(verdict.outcome, 'default')}]{verdict.outcome}[/]"
        lines.add_row(verdict.label, outcome, verdict.sentence)
    console.print(lines, highlight=False)


def _table(records: list[Record]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("", overflow="fold")
    titles = "train\nloss,val\nloss,gap\n,lowest val\n(at step),step\ntime,optimizer\nshare,peak\nmemory"
    for title in titles.split(","):
        table.add_column(title, justify="right", no_wrap=True)
    best = min(records, key=lambda record: math.inf if record.diverged else record.losses[1])
    for record in records:
        loss = f"{record.losses[1]:.3f}"
        table.add_row(
            record.label + ("" if record.finished else "*"),
            f"{record.losses[0]:.3f}",
            f"[bold green]{loss}[/]" if record is best else loss,
            f"{record.gap:.2f}",
            f"{record.validation[record.best]:.3f} ({record.steps[record.best]})",
            f"{1e3 * record.step_time:.1f} ms",
            f"{record.optimizer_time / record.step_time:.1%}",
            f"{record.peak_memory / 2**20:,.0f} MiB" if record.peak_memory else "?",
        )
    return table


def write_json(
    path: Path, records: list[Record], task: Task, args: argparse.Namespace, interrupted: bool
) -> None:
    """Write configuration, versions, device, curves, table and verdicts."""
    settings = {name: value for name, value in vars(args).items() if name not in ("run", "list")}
    contents = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "interrupted": interrupted,
        "seed": args.seed,
        "config": settings | {"device": str(args.device)},
        "model": {"name": task.model_name, "parameters": sum(p.numel() for p in task.model.parameters())},
        "text": {
            "name": task.text_name,
            "train_tokens": len(task.train),
            "validation_tokens": task.validation.numel(),
        },
        "device": _device_name(args.device),
        "backend": backend_name(task, args),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("fastreg", "torch", "transformers", "triton")},
        "memory": PeakMemory(args.device).method,
        "units": {
            "loss": "nats per token",
            "time": f"seconds, {QUANTILE:.0%} quantile over the steps",
            "peak_memory": "bytes",
        },
        "baseline": baseline(records).label if records else None,
        "contenders": [_entry(record) for record in records],
        "verdicts": {
            verdict.label: {"outcome": verdict.outcome, "sentence": verdict.sentence}
            for verdict in verdicts(records)
        },
    }
    document.write(path, contents)


def _entry(record: Record) -> dict[str, Any]:
    return {
        "label": record.label,
        "summary": record.summary,
        "finished": record.finished,
        "train_loss": record.losses[0],
        "validation_loss": record.losses[1],
        "gap": record.gap,
        "best_validation_loss": record.validation[record.best],
        "best_step": record.steps[record.best],
        "step_time": record.step_time,
        "optimizer_time": record.optimizer_time,
        "optimizer_share": record.optimizer_time / record.step_time,
        "peak_memory": record.peak_memory,
        "seconds": record.seconds,
        "curves": {"step": record.steps, "train": record.train, "validation": record.validation},
        "step_time_quantiles": {
            f"{q:.0%}": quantile(record.step_times, q) for q in (0.1, 0.25, 0.5, 0.75, 0.9)
        },
    }


def backend_name(task: Task, args: argparse.Namespace) -> str:
    """What runs fastreg's steps.

    Raises:
        RuntimeError: If the backend that is asked for cannot run there.
    """
    return backend.resolve(args.device, sum(parameter.numel() for parameter in task.model.parameters()))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
