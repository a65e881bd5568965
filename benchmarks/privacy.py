"""Measures time and memory of a private training step, against Opacus and a step without privacy."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastreg
from fastreg.ops import ghost as ghost_ops
from fastreg.privacy import DPOptimizer
from fastreg.reference import ghost as reference

from . import measure
from .steps import DTYPES
from .suite import OURS, Case, Check, Unavailable

BASELINE = "torch AdamW, not private"
LR, NOISE, MAX_NORM = 1e-4, 1.0, 1.0
VOCABULARY = 1000


class Block(nn.Module):
    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.attention = nn.LayerNorm(features), nn.Linear(features, 3 * features)
        self.project, self.after = nn.Linear(features, features), nn.LayerNorm(features)
        self.up, self.down = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attention(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.project(mixed)
        return x + self.down(F.gelu(self.up(self.after(x))))


class Transformer(nn.Module):
    """A GPT that Opacus supports: no tied weights, positions for each sample."""

    def __init__(self, layers: int, features: int, heads: int, length: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, features), nn.Embedding(length, features)
        self.blocks = nn.Sequential(*(Block(features, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(features), nn.Linear(features, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
        return self.head(self.norm(self.blocks(self.words(ids) + self.positions(positions))))


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the loss of each sample."""
    tokens = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return tokens.view_as(labels).mean(1)


@dataclass
class Workload:
    """Initial weights, a batch, and the expected sums of clipped gradients."""

    make: Callable[[], Transformer]
    start: dict[str, Tensor]
    batch: tuple[Tensor, Tensor]
    sums: list[Tensor]

    def model(self) -> Transformer:
        """Returns a model with the initial weights."""
        model = self.make()
        model.load_state_dict(self.start)
        return model


@dataclass
class Step:
    """A training step of one contender.

    Args:
        run: Takes the step and clears gradients.
        sums: Returns the sums of clipped gradients of the batch; `None` if the step is not private.
        device: The device of the model.
    """

    run: Callable[[], None]
    sums: Callable[[], list[Tensor]] | None
    device: torch.device

    def __call__(self) -> None:
        self.run()


def plain(workload: Workload) -> Step:
    """Returns a step of torch's fused AdamW without privacy."""
    model, (ids, labels) = workload.model(), workload.batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def run() -> None:
        losses(model(ids), labels).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Step(run, None, ids.device)


def ours(workload: Workload, around_torch: bool = False) -> Step:
    """Returns a step of fastreg's `DPOptimizer` around fastreg's AdamW, or around torch's."""
    model, (ids, labels) = workload.model(), workload.batch
    make: Any = torch.optim.AdamW if around_torch else fastreg.AdamW
    options = {"fused": True} if around_torch else {}
    optimizer = DPOptimizer(
        make(model.parameters(), lr=LR, **options), model=model, noise_multiplier=NOISE,
        max_grad_norm=MAX_NORM, expected_batch_size=len(ids),
    )  # fmt: skip

    def backward() -> None:
        losses(model(ids), labels).mean().backward()

    def run() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad()

    def sums() -> list[Tensor]:
        backward()
        result = [p.grad.clone() for p in model.parameters()]
        optimizer.zero_grad()
        return result

    return Step(run, sums, ids.device)


def opacus(workload: Workload, ghost: bool = False) -> Step:
    """Returns a step with Opacus' hooks, or its ghost norms and two backward passes, around torch's AdamW."""
    try:
        modules = importlib.import_module("opacus.grad_sample")
        optimizers = importlib.import_module("opacus.optimizers")
        utils = importlib.import_module("opacus.utils.fast_gradient_clipping_utils")
    except ImportError as error:
        raise Unavailable(f"needs Opacus: pip install 'fastreg[privacy]' ({error})") from None
    model, (ids, labels) = workload.model(), workload.batch
    base = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    settings = {
        "noise_multiplier": NOISE, "max_grad_norm": MAX_NORM, "expected_batch_size": len(ids),
    }  # fmt: skip
    if ghost:
        wrapped = modules.GradSampleModuleFastGradientClipping(
            model, max_grad_norm=MAX_NORM, use_ghost_clipping=True
        )
        optimizer = optimizers.DPOptimizerFastGradientClipping(base, **settings)
    else:
        wrapped = modules.GradSampleModule(model)
        optimizer = optimizers.DPOptimizer(base, **settings)

    def backward() -> None:
        loss = losses(wrapped(ids), labels)
        with warnings.catch_warnings():  # torch warns about Opacus' hooks on embeddings
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            (
                utils.DPTensorFastGradientClipping(wrapped, optimizer, loss) if ghost else loss.mean()
            ).backward()

    def run() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def sums() -> list[Tensor]:
        backward()
        optimizer.accumulate() if ghost else optimizer.clip_and_accumulate()
        result = [p.summed_grad.view_as(p).clone() for p in model.parameters()]
        optimizer.zero_grad(set_to_none=True)
        return result

    return Step(run, sums, ids.device)


def one_by_one(model: Transformer, ids: Tensor, labels: Tensor) -> list[Tensor]:
    """Returns sums of clipped gradients in float64, computed one sample at a time."""
    params = list(model.parameters())
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    for i in range(len(ids)):
        grads = torch.autograd.grad(losses(model(ids[i : i + 1]), labels[i : i + 1]).sum(), params)
        norm = float(torch.stack([g.double().norm() for g in grads]).norm())
        for total, g in zip(sums, grads, strict=True):
            total.add_(g.double(), alpha=min(1.0, MAX_NORM / norm))
    return sums


@dataclass(eq=False)  # hashed by identity
class PrivateStepCase(Case):
    """A private training step of a small GPT."""

    samples: int
    layers: int = 4
    features: int = 256
    heads: int = 4
    length: int = 64
    rounds: int = 11
    suite: str = "privacy"
    baseline: str = BASELINE

    def __post_init__(self) -> None:
        tokens = f"{self.samples} x {self.length} tokens"
        self.name = f"private step, {self.layers} layers of {self.features}, {tokens}"

    def setup(self, device: torch.device) -> Workload:
        def make() -> Transformer:
            return Transformer(self.layers, self.features, self.heads, self.length).to(device)

        torch.manual_seed(0)
        model = make()
        shape = self.samples, self.length
        batch = tuple(torch.randint(VOCABULARY, shape, device=device) for _ in range(2))
        start = {name: value.clone() for name, value in model.state_dict().items()}
        return Workload(make, start, batch, one_by_one(model, *batch))  # type: ignore[arg-type]

    def contenders(self) -> dict[str, Callable[[Workload], Step]]:
        """Returns a step without privacy, fastreg's around two optimizers, and two ways of Opacus."""
        return {
            BASELINE: plain,
            OURS: ours,
            f"{OURS}, torch AdamW": lambda workload: ours(workload, around_torch=True),
            "Opacus hooks": opacus,
            "Opacus ghost": lambda workload: opacus(workload, ghost=True),
        }

    def verify(self, name: str, workload: Workload, run: Any) -> list[Check]:
        """Compares the sums of clipped gradients with those of `one_by_one`, then takes a step."""
        off = 0.0
        if run.sums is not None:
            for actual, expected in zip(run.sums(), workload.sums, strict=True):
                off = max(off, float((actual.double() - expected).norm() / expected.norm()))
        run()
        # fastreg adds a bound on rounding errors to norms.
        return [Check("clipped sums", off, 1e-3)]

    def details(self, workload: Workload, run: Any) -> dict[str, Any]:
        """Returns the bytes that tensors take at the peak of a step beyond those held between steps."""
        return {"peak_bytes": peak_bytes(run, run.device)}


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Returns the bytes that tensors take at the peak of a call beyond those held before it."""
    if device.type == "cuda":
        return measure.temporary_bytes(run, device) or 0
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no log lines of the profiler
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    current = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        most = max(most, current)
    return most


@dataclass
class Factors:
    """The two factors of a linear layer's per-sample gradients, and the expected sums in float64."""

    left: Tensor
    right: Tensor
    sums: Tensor


@dataclass(eq=False)  # hashed by identity
class GhostCase(Case):
    """Norms of a linear layer's per-sample gradients, from their factors `[samples, positions, features]`."""

    samples: int
    positions: int
    outputs: int
    inputs: int
    storage: str
    rounds: int
    suite: str = "privacy"
    baseline: str = "torch bmm"

    def __post_init__(self) -> None:
        shape = f"{self.samples} x {self.positions} positions, {self.outputs} and {self.inputs} features"
        self.name = f"ghost norms, {shape}, {self.storage}"

    def setup(self, device: torch.device) -> Factors:
        generator = torch.Generator(device).manual_seed(0)
        left, right = (
            torch.randn(self.samples, self.positions, size, generator=generator, device=device).to(
                DTYPES[self.storage]
            )
            for size in (self.outputs, self.inputs)
        )
        sums = [
            reference.ghost_sums(a[None].double(), b[None].double()) for a, b in zip(left, right, strict=True)
        ]
        return Factors(left, right, torch.cat(sums, 1))

    def contenders(self) -> dict[str, Callable[[Factors], Any]]:
        """Returns fastreg's kernel, which stores no products of positions, and torch's batched products."""
        return {
            OURS: lambda factors: lambda: ghost_ops.ghost_sums(factors.left, factors.right),
            self.baseline: lambda factors: lambda: reference.ghost_sums(factors.left, factors.right),
        }

    def verify(self, name: str, workload: Factors, run: Any) -> list[Check]:
        """Compares the sums with those in float64, relative to the largest sum of each kind."""
        off = (run().double() - workload.sums).abs().amax(1) / workload.sums.abs().amax(1)
        return [Check("sums", float(off.max()), 1e-4)]

    def details(self, workload: Factors, run: Any) -> dict[str, Any]:
        """Returns the bytes that tensors take at the peak of a call."""
        return {"peak_bytes": peak_bytes(run, workload.left.device)}


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Returns cases of private steps, and on a GPU of the norms alone.

    The GPT has 3.7 M parameters on a CPU, fewer if quick, and the size of GPT-2 on a GPU.
    """
    if device.type == "cuda":
        rounds = 5 if quick else 20
        return [
            PrivateStepCase(16, 12, 768, 12, 256, rounds),
            *(GhostCase(16, 1024, 768, 3072, storage, rounds) for storage in ("bf16", "fp32")),
            *([] if quick else [PrivateStepCase(samples, 12, 768, 12, 256, rounds) for samples in (4, 64)]),
        ]
    if quick:
        return [PrivateStepCase(4, layers=1, features=64, rounds=3)]
    return [PrivateStepCase(samples) for samples in (4, 16, 64)]
