"""The loop behind `fastreg.loops`: batches of any kind, mixed precision, accumulation, validation.

    window of batches ──▶ gradients of each, in all passes ──▶ rates of this step ──▶ optimizer.step()

The `History` is up to date after every step, and an interruption leaves it as it is.
"""

import contextlib
import importlib
import itertools
import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..common.batches import move_to_device
from ..common.module_state import preserve_modes
from ..common.unwrap import find_optimizer
from ..optim import SAM
from ..recipe import Callbacks
from .batches import batch_loss, count_samples, count_tokens
from .evaluation import evaluate_with_averages, mean_loss
from .history import DivergedError, History
from .settings import Settings


def train(
    model: nn.Module, dataloader: Iterable[Any], history: History, callbacks: Callbacks, settings: Settings
) -> History:
    """Trains a model by the optimizer of a history, and removes the callbacks afterwards.

    The mode of every module is restored. Errors are those of `fastreg.loops`.
    """
    history.model, history.interrupted = model, False
    begin, before = time.perf_counter(), history.seconds
    try:
        with preserve_modes(model):
            callbacks.step(history.steps)
            _Loop(model, dataloader, settings, history, callbacks).run()
    except KeyboardInterrupt:
        history.interrupted = True
    finally:
        callbacks.remove()
        history.seconds = before + time.perf_counter() - begin
        history.optimizer.zero_grad()
    return history


class _Loop:
    """A training of one model with one optimizer."""

    def __init__(
        self, model: nn.Module, dataloader: Iterable[Any], settings: Settings, history: History,
        callbacks: Callbacks,
    ) -> None:  # fmt: skip
        self.model, self.dataloader, self.settings, self.history = model, dataloader, settings, history
        self.optimizer, self.callbacks = history.optimizer, callbacks
        self.device = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device
        if settings.amp == "fp16" and history.scaler is None:
            history.scaler = torch.amp.GradScaler(self.device.type)
        self.scaler = history.scaler if settings.amp == "fp16" else torch.amp.GradScaler(enabled=False)
        self.sam = find_optimizer(self.optimizer, SAM)
        self.norms: list[Tensor] = []
        self.bar: Any = None
        self.end = math.inf if settings.max_steps is None else history.steps + settings.max_steps
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def run(self) -> None:
        """Runs all epochs, each with its validation."""
        if self.settings.progress:
            with contextlib.suppress(ImportError):
                tqdm = importlib.import_module("tqdm").tqdm
                self.bar = tqdm(total=self.settings.steps(self.dataloader), unit="step")
        try:
            for epoch in itertools.count():
                if epoch == self.settings.epochs or self.history.steps == self.end:
                    return
                stopped = self._epoch(epoch)
                self._read_norms()
                if self.settings.validation is not None:
                    self.history.validation.append(self._validate(self.settings.validation))
                if stopped:
                    return
        finally:
            if self.bar is not None:
                self.bar.close()
            self._read_norms()
            if self.sam is not None:
                self.sam.abandon()  # a step that was interrupted

    def _read_norms(self) -> None:
        self.history.grad_norm += [float(norm) for norm in self.norms]
        self.norms = []

    def _epoch(self, epoch: int) -> bool:
        """Goes through the data once; returns whether the callback ended the training."""
        self.model.train()
        sampler: Any = getattr(self.dataloader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(len(self.history.epochs))
        first, batches = self.history.steps, iter(self.dataloader)
        try:
            while self.history.steps < self.end and (
                window := list(itertools.islice(batches, self.settings.accumulate))
            ):
                self._step(window)
                if self.settings.callback is not None and self.settings.callback(self.history) is True:
                    return True
        finally:
            losses = self.history.losses[first:]
            if losses:
                self.history.epochs.append(sum(losses) / len(losses))
        if not losses:
            after = f" after {epoch} epochs; is it an iterator that is used up?" if epoch else ""
            raise ValueError(f"dataloader has no batches{after or ': it is empty'}")
        return False

    def _step(self, window: list[Any]) -> None:
        step = self.history.steps
        losses = [self._gradients(batch, len(window), i == len(window)) for i, batch in enumerate(window, 1)]
        # Read after all passes have been launched, and before a step that would spoil the weights.
        loss = sum(map(float, losses)) / len(window)
        if not math.isfinite(loss):
            raise DivergedError(loss, self.history)
        warmup, schedule = self.settings.warmup, self.settings.schedule
        factor = min(1.0, (step + 1) / (warmup + 1)) * (1.0 if schedule is None else schedule(step))
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        norm = getattr(self.optimizer, "grad_norm", None)
        if norm is not None:
            self.norms.append(norm)
        self.history.losses.append(loss)
        self.history.lr.append(max(float(group["lr"]) for group in self.optimizer.param_groups))
        for batch in window:
            self.history.samples += count_samples(batch)
            self.history.tokens += count_tokens(batch)
        self.callbacks.step(step + 1)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            self.bar.update()

    def _gradients(self, batch: Any, count: int, last: bool) -> Tensor:
        """Adds the gradients of one of `count` batches of a step, and returns its loss."""
        # What SAM accumulates never reaches another backward pass, so each batch has to be reduced.
        local = not last and self.sam is None and hasattr(self.model, "no_sync")
        with self.model.no_sync() if local else contextlib.nullcontext():  # type: ignore[operator]
            return self.callbacks.gradients(
                lambda: self._loss(batch), accumulate=not last,
                backward=lambda loss: self.scaler.scale(loss / count).backward(),
            )  # fmt: skip

    def _loss(self, batch: Any) -> Tensor:
        dtype = torch.float16 if self.settings.amp == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=self.settings.amp is not None):
            batch = move_to_device(batch, self.device)
            if self.settings.compute_loss is not None:
                loss = self.settings.compute_loss(self.model, batch)
            else:
                loss = batch_loss(self.model, batch, self.settings.loss_fn)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shown = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"a loss must be a tensor with one number, got {shown}; take its mean")
        return loss.reshape(())

    def _validate(self, batches: Iterable[Any]) -> float:
        with evaluate_with_averages(self.optimizer):
            loss = mean_loss(self.model, batches, self._loss)
        if loss is None:
            raise ValueError("validation has no batches; is it an iterator that is used up?")
        return loss
