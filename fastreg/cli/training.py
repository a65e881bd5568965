"""Trains one contender and records its curves, its time and its memory."""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from . import text
from .contenders import Contender, Setup
from .measure import PeakMemory, Stopwatch

CURVE_WINDOWS = 256
"""Windows of each share, evenly spread, behind a point of the curves; the final losses take all of them."""

QUANTILE = 0.1
"""Times are told as this quantile over the steps, not as their median: on a CPU shared with other programs
medians of the same optimizer, minutes apart, differed by 20 %, this quantile by 4 %."""


@dataclass
class Record:
    """What a run has given so far; losses in nats per token, times in seconds."""

    label: str
    summary: str
    steps: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    whole: tuple[float, float] | None = None  # training and validation loss at the end, on all windows
    step_times: list[float] = field(default_factory=list)
    optimizer_times: list[float] = field(default_factory=list)
    peak_memory: int | None = None
    seconds: float = 0.0
    finished: bool = False

    @property
    def best(self) -> int:
        """Index of the lowest validation loss."""
        return min(range(len(self.validation)), key=lambda i: _or_inf(self.validation[i]))

    @property
    def losses(self) -> tuple[float, float]:
        """Training and validation loss at the end, or at the latest evaluation."""
        return self.whole or (self.train[-1], self.validation[-1])

    @property
    def gap(self) -> float:
        """Validation loss above training loss."""
        return self.losses[1] - self.losses[0]

    @property
    def diverged(self) -> bool:
        """Whether the loss is no longer a number."""
        return not math.isfinite(self.validation[-1])

    @property
    def step_time(self) -> float:
        """Time of an undisturbed training step."""
        return quantile(self.step_times)

    @property
    def optimizer_time(self) -> float:
        """Time of the optimizer in an undisturbed training step."""
        return quantile(self.optimizer_times)


def quantile(times: list[float], q: float = QUANTILE) -> float:
    """The quantile of some times; NaN of none."""
    return sorted(times)[int(q * (len(times) - 1))] if times else math.nan


def set_up(
    contender: Contender, model: torch.nn.Module, args: argparse.Namespace
) -> tuple[Setup, torch.optim.Optimizer]:
    """A fresh copy of the model and its optimizer, as the contender wants them.

    Raises:
        ValueError: If the library refuses a strength.
    """
    torch.manual_seed(args.seed)
    setup = Setup(copy.deepcopy(model).to(args.device), args.lr, args.weight_decay, args.seed, args.steps)
    contender.apply(setup)
    return setup, setup.optimizer(setup)


def train(
    contender: Contender,
    task: text.Task,
    args: argparse.Namespace,
    record: Record,
    progress: Callable[[Record, int], None],
) -> None:
    """Train a contender and fill its record on the way, so that an interruption keeps what there is.

    Args:
        contender: What to train with.
        task: Model and text.
        args: The arguments of `fastreg compare`, `device` being a `torch.device`.
        record: Filled in place.
        progress: Called after every step with the record and the steps done.
    """
    began = time.perf_counter()
    memory = PeakMemory(args.device)
    memory.reset()
    setup, optimizer = set_up(contender, task.model, args)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(args.warmup, 1))
    )
    tokens, train_windows = task.train.to(args.device), task.train_windows.to(args.device)
    validation_windows = task.validation.to(args.device)
    block = torch.arange(task.block_size, device=args.device)

    def losses(limit: int | None) -> tuple[float, float]:
        with setup.evaluation(optimizer):
            return (
                _mean_loss(setup.model, train_windows, 4 * args.batch_size, limit),
                _mean_loss(setup.model, validation_windows, 4 * args.batch_size, limit),
            )

    def evaluate() -> None:
        point = losses(CURVE_WINDOWS)
        record.steps.append(step)
        record.train.append(point[0])
        record.validation.append(point[1])

    step = 0
    whole, part = Stopwatch(args.device), Stopwatch(args.device)
    try:
        evaluate()
        setup.model.train()
        for step, starts in enumerate(
            task.batches(args.steps, args.batch_size, args.seed).to(args.device), start=1
        ):
            batch = tokens[starts[:, None] + block]
            with whole:
                setup.training_step(partial(text.loss, setup.model, batch), optimizer, part)
            schedule.step()
            for scheduler in setup.schedulers:
                scheduler.step()
            record.step_times.append(whole.take())
            record.optimizer_times.append(part.take())
            if step % args.eval_every == 0 or step == args.steps:
                evaluate()
                if record.diverged:
                    break
            progress(record, step)
        if max(len(train_windows), len(validation_windows)) > CURVE_WINDOWS:
            record.whole = losses(None)
        record.finished = True
    finally:
        record.peak_memory = memory.bytes()
        record.seconds = time.perf_counter() - began


@torch.no_grad()
def _mean_loss(model: torch.nn.Module, windows: Tensor, batch_size: int, limit: int | None) -> float:
    if limit is not None:
        windows = windows[:: math.ceil(len(windows) / limit)]
    training = model.training
    model.eval()
    total = sum(float(text.loss(model, batch)) * len(batch) for batch in windows.split(batch_size))
    model.train(training)
    return total / len(windows)


def _or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf
