"""Trains one contender with one seed and records its curves, its time and its memory."""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...recipe import Callbacks
from ...training.evaluation import evaluate_with_averages, mean_loss
from ..measure import PeakMemory, Stopwatch
from . import text
from .results import Record
from .setup import Setup

CURVE_WINDOWS = 256
"""Evenly spread windows of each share behind a point of the curves; the final losses take all windows."""

PARTS = ("model", "optimizer", "schedule", "callbacks")
"""Attributes of a run that have a state."""


class Run:
    """A model in training with one seed: a fresh copy, its optimizer and the callbacks of a contender.

    Raises `ValueError` if the library refuses a strength.
    """

    optimizer: Any
    callbacks: Callbacks

    def __init__(self, contender: Any, task: text.Task, args: argparse.Namespace, seed: int) -> None:
        self.model = task.build_model(seed).to(args.device)
        torch.manual_seed(seed)
        windows = len(task.train) // task.block_size
        setup = Setup(
            self.model, args.lr, args.weight_decay, seed, args.steps, args.batch_size, max(windows, 1)
        )
        contender.apply(setup)
        self.optimizer, self.callbacks = setup.make()
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / max(args.warmup, 1))
        )
        self._devices = [args.device] if args.device.type == "cuda" else []

    def step(self, batch: Tensor, watch: Stopwatch) -> None:
        """Takes one training step on a batch, and measures the optimizer's share of it."""
        self.callbacks.training_step(partial(text.loss, self.model, batch), self.optimizer, watch=watch)

    def after_step(self) -> None:
        """Sets learning rate and other rates of the next step."""
        self.schedule.step()
        self.callbacks.step()

    @property
    def budget(self) -> str:
        """The privacy that was spent, and who computed it; empty for training that is not private."""
        if getattr(self.optimizer, "accountant", None) is None:
            return ""
        return (
            f"epsilon {self.optimizer.epsilon(1e-5)} for a window, had batches been Poisson-sampled from "
            "windows that do not overlap"
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that the next steps depend on."""
        state = {name: getattr(self, name).state_dict() for name in PARTS}
        on_devices = [torch.cuda.get_rng_state(device) for device in self._devices]
        return {**state, "random": [torch.get_rng_state(), *on_devices]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, so that training continues from there."""
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["random"][0])
        for device, random in zip(self._devices, state["random"][1:], strict=True):
            torch.cuda.set_rng_state(random, device)


def train(
    contender: Any, task: text.Task, args: argparse.Namespace, record: Record,
    progress: Callable[[Record, int], None], save: Callable[[dict[str, Any]], None],
    state: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Trains a contender and fills its record on the way, which an interruption leaves as it is.

    `progress` is called after every step with the record and the number of steps done, `save` with the state
    after every evaluation but the last; with such a state and its record, an interrupted run goes on.
    """
    begin, before = time.perf_counter(), (record.seconds, record.peak_memory or 0)
    memory = PeakMemory(args.device)
    memory.reset()
    run = Run(contender, task, args, record.seed)
    tokens, train_windows = task.train.to(args.device), task.train_windows.to(args.device)
    validation_windows = task.validation.to(args.device)
    block = torch.arange(task.block_size, device=args.device)

    def losses(limit: int | None) -> tuple[float, float]:
        def loss(windows: Tensor) -> Any:
            step = 1 if limit is None else math.ceil(len(windows) / limit)
            batches = windows[::step].split(4 * args.batch_size)
            return mean_loss(run.model, batches, partial(text.loss, run.model))

        with evaluate_with_averages(run.optimizer):
            return loss(train_windows), loss(validation_windows)

    def evaluate() -> None:
        point = losses(CURVE_WINDOWS)
        record.steps.append(step)
        record.train.append(point[0])
        record.validation.append(point[1])
        if step < args.steps and not record.diverged:
            note()
            save(run.state_dict())

    def note() -> None:
        peak = memory.bytes()
        record.peak_memory = None if peak is None else max(peak, before[1])
        record.seconds = before[0] + time.perf_counter() - begin

    step = 0
    whole, part = Stopwatch(args.device), Stopwatch(args.device)
    try:
        if state is None:
            evaluate()
        else:
            run.load_state_dict(state)
        run.model.train()
        starts = task.batches(args.steps, args.batch_size, record.seed).to(args.device)
        for step in range(record.steps[-1] + 1, args.steps + 1):
            batch = tokens[starts[step - 1, :, None] + block]
            with whole:
                run.step(batch, part)
            run.after_step()
            record.step_times.append(whole.take())
            record.optimizer_times.append(part.take())
            if step % args.eval_every == 0 or step == args.steps:
                evaluate()
                if record.diverged:
                    break
            progress(record, step)
        if max(len(train_windows), len(validation_windows)) > CURVE_WINDOWS:
            record.whole = losses(None)
        record.budget = run.budget
        record.finished = True
    finally:
        note()
