"""Times a whole training step of GPT-2, with and without regularizers, and the optimizer's part of it."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastreg.cli.measure import Stopwatch

from . import measure, peers
from .suite import OURS, Case, Check, Unavailable

CHAINS = ("AdamW", "clip+AdamW", "clip+AdamW+EMA", "clip+noise+AdamW+EMA")
LR, WEIGHT_DECAY, MAX_NORM = 1e-4, 0.1, 1.0
STEPS = 3
"""Steps that a contender takes from the start before its loss is compared."""


@dataclass
class Workload:
    """A model, its initial weights, a batch of tokens, and the expected loss of each chain."""

    model: Any
    start: list[Tensor]
    batch: Tensor
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    losses: dict[str, float] = field(default_factory=dict)

    def loss(self) -> Tensor:
        """Returns the loss of the model on the batch."""
        with self.autocast():
            return self.model(input_ids=self.batch, labels=self.batch).loss

    @torch.no_grad()
    def reset(self) -> None:
        """Restores the initial weights and clears the gradients."""
        torch._foreach_copy_(list(self.model.parameters()), self.start)
        self.model.zero_grad()


@dataclass
class TrainingStep:
    """A training step: forward pass, backward pass and the optimizer's step, which is also timed alone."""

    workload: Workload
    step: peers.Step
    watch: Stopwatch
    optimizer: measure.Timing = field(default_factory=measure.Timing)

    def __call__(self) -> None:
        self.workload.loss().backward()
        with self.watch:
            self.step()
        self.step.optimizer.zero_grad()


@dataclass(eq=False)  # hashed by identity
class TrainingCase(Case):
    """GPT-2 from random weights on a batch of `rows` x `columns` tokens."""

    model: str
    layers: int
    vocabulary: int
    rows: int
    columns: int
    rounds: int
    suite: str = "training"
    baseline: str = "torch AdamW"

    def __post_init__(self) -> None:
        self.name = f"{self.model} training step, {self.rows} x {self.columns} tokens"

    def setup(self, device: torch.device) -> Workload:
        try:
            transformers: Any = importlib.import_module("transformers")
        except ImportError as error:
            raise Unavailable(f"needs transformers: pip install 'fastreg[cli]' ({error})") from None
        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)  # losses are compared
        config = transformers.GPT2Config(
            n_layer=self.layers, vocab_size=self.vocabulary, bos_token_id=0, eos_token_id=0, use_cache=False,
            **rates,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config).to(device).train()
        needed = (4 * len(CHAINS) + 6) * 4 * sum(p.numel() for p in model.parameters())
        if needed > measure.free_memory(device):
            raise Unavailable(f"needs {needed / 2**30:.0f} GiB of memory")
        batch = torch.randint(config.vocab_size, (self.rows, self.columns), device=device)
        autocast = (
            partial(torch.autocast, "cuda", torch.bfloat16)
            if device.type == "cuda"
            else contextlib.nullcontext
        )
        return Workload(model, [p.detach().clone() for p in model.parameters()], batch, autocast)

    def contenders(self) -> dict[str, Callable[[Workload], TrainingStep]]:
        """Returns two contenders for each chain: torch's composition, then fastreg's single pass."""
        makers = {"torch": peers.fused, OURS: peers.fastreg_step}
        return {
            f"{who} {chain}": partial(self._build, make, chain)
            for chain in CHAINS
            for who, make in makers.items()
        }

    def _build(self, make: peers.Build, chain: str, workload: Workload) -> TrainingStep:
        workload.reset()
        step = make(chain, list(workload.model.parameters()), MAX_NORM)
        for group in step.optimizer.param_groups:
            group |= {"lr": LR, "weight_decay": WEIGHT_DECAY}
        return TrainingStep(workload, step, Stopwatch(workload.batch.device))

    def verify(self, name: str, workload: Workload, run: Any) -> list[Check]:
        """Compares the loss after `STEPS` steps with that of torch's composition.

        torch's is verified first, so its loss becomes the expected one.  With noise it may differ by 5 %.
        """
        workload.reset()
        for _ in range(STEPS):
            run()
        reached = float(workload.loss().detach())
        library, chain = name.split(" ")
        if library != OURS:
            workload.losses[chain] = reached
        elif chain not in workload.losses:
            raise Unavailable(f"torch {chain} failed, so that there is no loss to compare with")
        expected = workload.losses[chain]
        # In bf16 the backward pass of attention sums in no fixed order.
        exact = 5e-3 if workload.batch.is_cuda else 1e-3
        return [Check("loss", abs(reached / expected - 1), 0.05 if "noise" in chain else exact)]

    def time(
        self, workload: Workload, runs: dict[str, Any], clock: measure.Clock
    ) -> dict[str, measure.Timing]:
        """Times the wall time of each whole step, and the optimizer's part of it by a stopwatch."""
        timings = {name: measure.Timing() for name in runs}
        names = list(runs)
        for turn in range(-1, self.rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                run = runs[name]
                run.watch.take()
                seconds = clock.wall(run)
                if turn >= 0:
                    timings[name].seconds.append(seconds)
                    run.optimizer.seconds.append(run.watch.take())
        return timings

    def details(self, workload: Workload, run: Any) -> dict[str, Any]:
        """Returns median and quantiles of the optimizer's part, in milliseconds."""
        return {"optimizer_ms": measure.quantiles(run.optimizer.seconds)}


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Returns one case: GPT-2 small, on a CPU with fewer tokens, and there a smaller model if quick."""
    if device.type == "cuda":
        return [TrainingCase("GPT-2 124M", 12, 50257, 8, 1024, 10 if quick else 30)]
    if quick:
        return [TrainingCase("GPT-2 21M", 2, 8192, 1, 64, 3)]
    return [TrainingCase("GPT-2 124M", 12, 50257, 1, 256, 5)]
