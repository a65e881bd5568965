"""The loop behind the ready-made ones: batches of any kind, mixed precision, accumulation, validation.

    window of batches ──▶ loss / batches, backward, for each ──▶ rates of this step ──▶ optimizer.step()

What is there is in the `History` at any time, which an interruption leaves as it is.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..common.batches import move_to_device
from .batches import Loss, batch_loss, samples, tokens
from .evaluation import evaluate_with_averages


@dataclass
class History:
    """What a loop has done so far.

    Args:
        losses: Of each optimizer step, the mean over its batches.
        lr: Of each step, the highest of all groups.
        grad_norm: Of each step, before clipping; empty where nothing measures it.
        epochs: The mean loss of each epoch, the last of which may be shorter.
        validation: The mean loss on the validation data after each epoch.
        samples: How many were trained on.
        tokens: How many of these, without padding, where batches have `input_ids`.
        seconds: What it took, validation included.
        interrupted: Whether by a KeyboardInterrupt.
        model: What was trained.
        optimizer: With its averages, if it has any; where training goes on.
        scaler: The `GradScaler` of `amp="fp16"`.
    """

    losses: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    epochs: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    model: Any = field(default=None, repr=False)
    optimizer: Any = field(default=None, repr=False)
    scaler: Any = field(default=None, repr=False)

    @property
    def steps(self) -> int:
        """Of the optimizer."""
        return len(self.losses)

    @property
    def samples_per_second(self) -> float:
        """NaN before anything was done."""
        return self.samples / self.seconds if self.seconds else math.nan

    @property
    def tokens_per_second(self) -> float:
        """NaN before anything was done."""
        return self.tokens / self.seconds if self.seconds else math.nan

    def to_dict(self) -> dict[str, Any]:
        """All that is numbers, such as for JSON."""
        held = ("model", "optimizer", "scaler")
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in held}
        plain = {name: list(value) if isinstance(value, list) else value for name, value in plain.items()}
        rates = {name: getattr(self, name) for name in ("samples_per_second", "tokens_per_second")}
        return {"steps": self.steps, **plain, **rates}


class DivergedError(FloatingPointError):
    """A loss that is no number; the weights are those before the step, `history` tells what was before."""

    def __init__(self, loss: float, history: History) -> None:
        super().__init__(
            f"the loss is {loss} at step {history.steps}, which was not taken: lower lr, clip gradients, or "
            "look for NaN in the data"
        )
        self.history = history


@dataclass(frozen=True)
class Settings:
    """What all loops take besides.

    Args:
        epochs: How often the data is gone through; `None`: until `max_steps`.
        max_steps: Optimizer steps after which to stop, if epochs are not over before.
        device: Where to train; by default where the model is.
        amp: `"bf16"` or `"fp16"` for mixed precision, the latter with a `GradScaler`.
        accumulate: Batches for each step; gradients are means over them, also over fewer at the end.
        schedule: Factor of all learning rates as a function of the step, such as those of
            `fastreg.schedules`.
        warmup: Steps over which the factor rises from 0 in equal steps, on top of the schedule.
        loss_fn: `loss_fn(outputs, labels)`.  By default a mapping's loss is the model's own, that of
            (inputs, labels) the cross-entropy.  A tensor is its own label.
        compute_loss: `compute_loss(model, batch)`, such as `lambda *given: fastreg.r_drop(*given).loss`,
            for batches of any kind.
        validation: Batches to validate with after each epoch, under the averaged weights where there are any.
        callback: Called with the history after every step; what returns `True` ends the training.
        history: Of a training of the same model to go on with, with all its counts and its optimizer, which
            no other learning rate, decay or regularizers take the place of.
        progress: Whether to show a bar, if tqdm is installed.

    Raises:
        TypeError: For what should be called and cannot be.
        ValueError: For values out of range.
    """

    epochs: int | None = 1
    max_steps: int | None = None
    device: torch.device | str | int | None = None
    amp: Literal["bf16", "fp16"] | None = None
    accumulate: int = 1
    schedule: Callable[[int], float] | None = None
    warmup: int = 0
    loss_fn: Loss | None = None
    compute_loss: Callable[[nn.Module, Any], Tensor] | None = None
    validation: Iterable[Any] | None = None
    callback: Callable[[History], Any] | None = None
    history: History | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("max_steps", 1), ("accumulate", 1), ("warmup", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name} must be an integer >= {least}, got {name}={value!r}")
        for name in ("schedule", "loss_fn", "compute_loss", "callback"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be a function, got {name}={value!r}")
        if self.epochs is None and self.max_steps is None:
            raise ValueError("give epochs= or max_steps=, got None for both")
        if self.amp not in (None, "bf16", "fp16"):
            raise ValueError(f"amp must be None, 'bf16' or 'fp16', got amp={self.amp!r}")
        if self.loss_fn is not None and self.compute_loss is not None:
            raise ValueError("give loss_fn= or compute_loss=, not both")

    def steps(self, dataloader: Any) -> int | None:
        """How many optimizer steps there will be; `None` where only the data knows."""
        try:
            whole = None if self.epochs is None else self.epochs * -(-len(dataloader) // self.accumulate)
        except TypeError:  # no length
            return self.max_steps if self.epochs is None else None
        return min(n for n in (whole, self.max_steps) if n is not None)


def train(
    model: nn.Module, dataloader: Iterable[Any], make_optimizer: Callable[[], torch.optim.Optimizer],
    settings: Settings, after_step: Callable[[int], None] | None = None,
) -> History:  # fmt: skip
    """Train, and put every module back into the mode in which it was.

    Args:
        model: Any model.
        dataloader: Batches, see `Settings.loss_fn`.
        make_optimizer: Called once the model is on its device, if there is no optimizer from before.
        settings: The settings.
        after_step: Called with the number of steps done.

    Raises:
        DivergedError: At a loss that is NaN or infinite.
        ValueError: For data without batches, batches without labels, models without loss, and the history of
            another model.
        TypeError: For batches of an unknown kind.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if settings.device is not None:
        model.to(settings.device)
    history = History() if settings.history is None else settings.history
    if history.optimizer is not None:
        trained = {id(p) for group in history.optimizer.param_groups for p in group["params"]}
        if trained.isdisjoint(map(id, model.parameters())):
            raise ValueError(
                "history= is of another model, and its optimizer would leave this one as it is: give the "
                "model that it was for, history.model"
            )
    history.model, history.interrupted = model, False
    if history.optimizer is None:
        history.optimizer = make_optimizer()
    modes = [(module, module.training) for module in model.modules()]
    loop = _Loop(model, dataloader, settings, history, after_step)
    began, before = time.perf_counter(), history.seconds
    try:
        loop.run()
    except KeyboardInterrupt:
        history.interrupted = True
    finally:
        loop.settle()
        history.seconds = before + time.perf_counter() - began
        history.optimizer.zero_grad()
        for module, mode in modes:
            module.training = mode
    return history


class _Loop:
    """One training."""

    def __init__(
        self, model: nn.Module, dataloader: Iterable[Any], settings: Settings, history: History,
        after_step: Callable[[int], None] | None,
    ) -> None:  # fmt: skip
        self.model, self.dataloader, self.settings, self.history = model, dataloader, settings, history
        self.optimizer, self.after_step = history.optimizer, after_step
        place = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))
        self.device = place.device
        if settings.amp == "fp16" and history.scaler is None:
            history.scaler = torch.amp.GradScaler(self.device.type)
        self.scaler = history.scaler if settings.amp == "fp16" else None
        self.first = history.steps
        self.norms: list[Tensor] = []
        self.bar: Any = None
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def run(self) -> None:
        """All epochs."""
        with self._progress():
            for epoch in itertools.count():
                if epoch == self.settings.epochs or self._enough():
                    return
                stopped = self._epoch(epoch)
                self.settle()
                if self.settings.validation is not None:
                    self.history.validation.append(self._validate(self.settings.validation))
                if stopped:
                    return

    def settle(self) -> None:
        """Read what the device has measured meanwhile."""
        self.history.grad_norm += [float(norm) for norm in self.norms]
        self.norms = []

    def _enough(self) -> bool:
        return self.history.steps - self.first == self.settings.max_steps

    def _epoch(self, epoch: int) -> bool:
        """Whether the callback wants no other."""
        self.model.train()
        sampler: Any = getattr(self.dataloader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(len(self.history.epochs))
        start, batches = self.history.steps, iter(self.dataloader)
        try:
            while not self._enough() and (
                window := list(itertools.islice(batches, self.settings.accumulate))
            ):
                self._step(window)
                if self.settings.callback is not None and self.settings.callback(self.history) is True:
                    return True
        finally:
            done = self.history.losses[start:]
            if done:
                self.history.epochs.append(sum(done) / len(done))
        if not done:
            after = f" after {epoch} epochs; is it an iterator that is used up?" if epoch else ""
            raise ValueError(f"dataloader has no batches{after or ': it is empty'}")
        return False

    def _step(self, window: list[Any]) -> None:
        step, total = self.history.steps, 0.0
        losses = []
        for i, batch in enumerate(window):
            last = i == len(window) - 1
            with (
                contextlib.nullcontext() if last else getattr(self.model, "no_sync", contextlib.nullcontext)()
            ):
                loss = self._loss(batch)
                share = loss / len(window)
                (share if self.scaler is None else self.scaler.scale(share)).backward()
            losses.append(loss.detach())
        # Read once everything is under way, and before a step that would spoil the weights.
        total = sum(map(float, losses)) / len(window)
        if not math.isfinite(total):
            raise DivergedError(total, self.history)
        factor = self._factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        norm = getattr(self.optimizer, "grad_norm", None)
        if norm is not None:
            self.norms.append(norm)
        self.history.losses.append(total)
        self.history.lr.append(max(float(group["lr"]) for group in self.optimizer.param_groups))
        for batch in window:
            self.history.samples += samples(batch)
            self.history.tokens += tokens(batch)
        if self.after_step is not None:
            self.after_step(step + 1)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{total:.4g}", refresh=False)
            self.bar.update()

    def _factor(self, step: int) -> float:
        warmup, schedule = self.settings.warmup, self.settings.schedule
        return min(1.0, (step + 1) / (warmup + 1)) * (1.0 if schedule is None else schedule(step))

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

    @torch.no_grad()
    def _validate(self, batches: Iterable[Any]) -> float:
        total, count = torch.zeros((), dtype=torch.float64), 0
        with evaluate_with_averages(self.optimizer):
            self.model.eval()
            for batch in batches:
                size = samples(batch)
                total = total + size * self._loss(batch).double().cpu()
                count += size
        if not count:
            raise ValueError("validation has no batches; is it an iterator that is used up?")
        return float(total) / count

    @contextlib.contextmanager
    def _progress(self) -> Iterator[None]:
        if self.settings.progress:
            with contextlib.suppress(ImportError):
                tqdm = importlib.import_module("tqdm").tqdm
                self.bar = tqdm(total=self.settings.steps(self.dataloader), unit="step")
        try:
            yield
        finally:
            if self.bar is not None:
                self.bar.close()
