"""Reports what `fastreg compare` does: a heading, a table, verdicts, and everything as JSON."""

import argparse
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from ...common.versions import installed_version
from ...runtime import backend
from .. import document
from ..measure import PeakMemory
from .results import QUANTILE, Record, Result, quantile
from .text import Task
from .verdicts import baseline, headline, verdicts


def heading(task: Task, args: argparse.Namespace) -> str:
    """Returns lines that say which model is trained on which text, and how.

    Raises `RuntimeError` if the backend in FASTREG_BACKEND cannot run on the device.
    """
    shares = f"{len(task.train):,} tokens to train, {task.validation.numel():,} to validate"
    batch = f"{args.batch_size} x {args.block_size} tokens"
    last = f" to {args.seed + args.seeds - 1}" if args.seeds > 1 else ""
    return (
        f"[bold]{escape(task.model_name)}[/] ({task.parameters:,} parameters)\n"
        f"{escape(task.text_name)}: {shares}\n"
        f"{args.steps} steps of {batch}, lr {args.lr:g}, seed {args.seed}{last}; "
        f"{_device_name(args.device)}, fastreg backend {backend.resolve(args.device, task.parameters)}\n"
    )


def show(console: Console, results: list[Result], memory: str) -> None:
    """Prints the table and the verdicts."""
    if not results:
        return
    table = _table(results)
    # Wider than a narrow terminal, rather than without the names of contenders.
    wide = Measurement.get(console, console.options.update(max_width=300), table).maximum
    Console(width=max(wide, console.width)).print(table)
    notes = [f"* stopped, losses of step {result.steps[-1]}" for result in results if not result.finished]
    if any(len(result.runs) > 1 for result in results):
        notes.append("means over seeds ± standard deviations")
    if (most := max(len(result.runs) for result in results)) > min(len(result.runs) for result in results):
        fewer = (f"{r.label} {len(r.runs)}" for r in results if len(r.runs) < most)
        notes.append(f"{most} seeds, but of {', '.join(fewer)}")
    notes += [f"{result.label}: {record.budget}" for result in results if (record := result.runs[0]).budget]
    notes += ["losses in nats per token", f"times of undisturbed steps ({QUANTILE:.0%} quantile)", memory]
    console.print("; ".join(notes) + "\n", style="dim")
    console.print(f"[bold]{headline(results)[0]}[/]")
    colours = {"helped": "green", "hurt": "red", "diverged": "red"}
    lines = Table.grid(padding=(0, 2))
    lines.add_column(overflow="fold")
    lines.add_column(no_wrap=True)
    for verdict in verdicts(results):
        outcome = f"[{colours.get(verdict.outcome, 'default')}]{verdict.outcome}[/]"
        lines.add_row(escape(verdict.label), outcome, escape(verdict.sentence))
    console.print(lines)


def _table(results: list[Result]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("", no_wrap=True)
    titles = "train\nloss,val\nloss,gap\n,lowest val\n(at step),step\ntime,optimizer\nshare,peak\nmemory"
    for title in titles.split(","):
        table.add_column(title, justify="right", no_wrap=True)
    best = min(results, key=lambda result: math.inf if result.diverged else result.losses[1])
    for result in results:
        train, loss = (
            f"{mean:.3f}" + (f" ±{spread:.3f}" if result.deviations else "")
            for mean, spread in zip(result.losses, result.deviations or (0.0, 0.0), strict=True)
        )
        table.add_row(
            escape(result.label) + ("" if result.finished else "*"),
            train,
            f"[bold green]{loss}[/]" if result is best else loss,
            f"{result.gap:.2f}",
            f"{result.validation[result.best]:.3f} ({result.steps[result.best]})",
            f"{1e3 * result.step_time:.1f} ms",
            f"{result.optimizer_time / result.step_time:.1%}",
            f"{result.peak_memory / 2**20:,.0f} MiB" if result.peak_memory else "?",
        )
    return table


def write_json(
    path: Path, results: list[Result], task: Task, args: argparse.Namespace, interrupted: bool
) -> None:
    """Writes configuration, versions, device, curves, table and verdicts."""
    settings = {name: value for name, value in vars(args).items() if name not in ("run", "list", "explicit")}
    contents = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "interrupted": interrupted,
        "seed": args.seed,
        "config": settings | {"device": str(args.device)},
        "model": {"name": task.model_name, "parameters": task.parameters},
        "text": {"name": task.text_name, "train_tokens": len(task.train),
                 "validation_tokens": task.validation.numel()},
        "device": _device_name(args.device),
        "backend": backend.resolve(args.device, task.parameters),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {name: installed_version(name) for name in ("fastreg", "torch", "transformers", "triton")},
        "memory": PeakMemory(args.device).method,
        "units": {"loss": "nats per token", "time": f"seconds, {QUANTILE:.0%} quantile over the steps",
                  "peak_memory": "bytes"},
        "baseline": baseline(results).label if results else None,
        "contenders": [_entry(result) for result in results],
        "verdicts": {
            verdict.label: {"outcome": verdict.outcome, "sentence": verdict.sentence}
            for verdict in verdicts(results)
        },
    }  # fmt: skip
    document.write(path, contents)


def _entry(result: Result) -> dict[str, Any]:
    """Returns the JSON of a contender: means over its runs, then each run."""
    train, validation = result.deviations or (None, None)
    return {
        "label": result.label,
        "summary": result.summary,
        "privacy_budget": result.runs[0].budget or None,
        **_measured(result),
        "train_loss_std": train,
        "validation_loss_std": validation,
        "gap": result.gap,
        "best_validation_loss": result.validation[result.best],
        "best_step": result.steps[result.best],
        "step_time": result.step_time,
        "optimizer_time": result.optimizer_time,
        "optimizer_share": result.optimizer_time / result.step_time,
        "seconds": sum(record.seconds for record in result.records),
        "step_time_quantiles": {
            f"{q:.0%}": quantile(result.times("step_times"), q) for q in (0.1, 0.25, 0.5, 0.75, 0.9)
        },
        "runs": [
            {"seed": record.seed, "seconds": record.seconds, **_measured(record)} for record in result.records
        ],
    }


def _measured(run: Result | Record) -> dict[str, Any]:
    return {
        "finished": run.finished,
        "train_loss": run.losses[0],
        "validation_loss": run.losses[1],
        "peak_memory": run.peak_memory,
        "curves": {"step": run.steps, "train": run.train, "validation": run.validation},
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"
