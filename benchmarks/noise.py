"""Measures noise on activations, on embeddings as in NEFTune, and on weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastreg
from fastreg.nn.functional import gaussian_noise, uniform_noise

from . import shapes
from .dropout import ACTIVATION_SIZES
from .steps import DTYPES
from .suite import OURS, Case, Check

STD, ALPHA, LENGTH, FEATURES = 0.1, 5.0, 512, 1024
EMBEDDED = 0.02
"""Standard deviation of embeddings."""
FIVE_SIGMA = 5.0


@dataclass
class Workload:
    """An input, which takes gradients where both passes are timed, and the gradient of the result."""

    x: Tensor
    gradient: Tensor


@dataclass
class NoisePasses:
    """A run of a function of x, with or without its backward pass."""

    function: Callable[[Tensor], Tensor]
    workload: Workload
    backward: bool

    def __call__(self) -> tuple[Tensor, ...]:
        x = self.workload.x
        if not self.backward:
            with torch.no_grad():
                return (self.function(x),)
        y = self.function(x)
        return y, *torch.autograd.grad(y, x, self.workload.gradient)


def neftune(x: Tensor) -> Tensor:
    """Returns x plus noise, computed as in the NEFTune hook of transformers."""
    dims = torch.tensor(x.size(1) * x.size(2))
    magnitude = ALPHA / torch.sqrt(dims)
    return x + torch.zeros_like(x).uniform_(-magnitude, magnitude)


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], str]] = {
    "additive noise": (lambda x: gaussian_noise(x, STD), lambda x: x + STD * torch.randn_like(x), "torch"),
    "multiplicative noise, both passes": (
        lambda x: gaussian_noise(x, STD, kind="multiplicative"),
        lambda x: x * (1 + STD * torch.randn_like(x)),
        "torch",
    ),
    "NEFTune": (
        lambda x: uniform_noise(x, ALPHA / math.sqrt(x.shape[1] * x.shape[2])), neftune, "transformers' hook",
    ),
}  # fmt: skip
"""By the name of an operation: fastreg's function, the function of the baseline, and the baseline's name."""


@dataclass(eq=False)  # hashed by identity
class NoiseCase(Case):
    """Noise on `[rows, 512, 1024]`; `what` is one of `KINDS`."""

    what: str
    elements: int
    storage: str
    rounds: int
    suite: str = "noise"

    def __post_init__(self) -> None:
        self.name = f"{self.what}, {self.elements / 2**20:g}M {self.storage}"
        self.baseline = KINDS[self.what][2]
        self.both = "both passes" in self.what
        self.bytes = self.elements * DTYPES[self.storage].itemsize * (4 if self.both else 2)

    def setup(self, device: torch.device) -> Workload:
        generator = torch.Generator(device).manual_seed(0)
        shape = self.elements // (LENGTH * FEATURES), LENGTH, FEATURES
        size = EMBEDDED if self.what == "NEFTune" else 1.0
        x, gradient = (
            (size * torch.randn(shape, generator=generator, device=device)).to(DTYPES[self.storage])
            for _ in range(2)
        )
        return Workload(x.requires_grad_(self.both), gradient)

    def contenders(self) -> dict[str, Callable[[Workload], Any]]:
        """Returns fastreg's function, and the baseline's, eager and compiled."""
        ours, theirs, name = KINDS[self.what]
        return {
            OURS: lambda workload: NoisePasses(ours, workload, self.both),
            name: lambda workload: NoisePasses(theirs, workload, self.both),
            f"{name}, torch.compile": lambda workload: NoisePasses(
                torch.compile(theirs), workload, self.both
            ),
        }

    def verify(self, name: str, workload: Workload, run: Any) -> list[Check]:
        """Checks mean and variance of the noise, and that the gradient has the same factor as the result."""
        y, *of_x = (t.detach().double() for t in run())
        x = workload.x.detach().double()
        uniform, eps = self.what == "NEFTune", torch.finfo(DTYPES[self.storage]).eps
        std = ALPHA / math.sqrt(3 * LENGTH * FEATURES) if uniform else STD
        known = x.abs() >= 0.5 * self.both  # for x near 0, y / x is inexact
        z = ((y / x - 1 if self.both else y - x) / std)[known]
        # Rounding to the dtype adds variance: at most that of a unit in the last place.
        size = 1.0 if self.both else float(y.square().mean())
        rounding = 2 * eps**2 * size / 12 / std**2
        kurtosis, n = 9 / 5 if uniform else 3.0, z.numel()
        mean = abs(float(z.mean())) * math.sqrt(n)
        spread = max(abs(float(z.square().mean()) - 1) - rounding, 0) * math.sqrt(n / (kurtosis - 1))
        checks = [Check("mean, in σ", mean, FIVE_SIGMA), Check("variance, in σ", spread, FIVE_SIGMA)]
        if of_x:
            wanted = workload.gradient.double()[known] * (1 + STD * z)
            off = (of_x[0][known] - wanted).abs().amax() / wanted.abs().amax()
            checks.append(Check("gradient", float(off), 4 * eps))
        return checks


@dataclass
class Excursion:
    """A run that perturbs weights and then restores them."""

    params: list[Tensor]
    perturb: Callable[[], Any]
    restore: Callable[[], Any]

    def __call__(self) -> None:
        self.perturb()
        self.restore()


@dataclass(eq=False)
class WeightNoiseCase(Case):
    """Adding noise to all weights of a model, and restoring them."""

    model: str
    sizes: shapes.Sizes
    storage: str
    rounds: int
    suite: str = "noise"
    baseline: str = "torch"

    def __post_init__(self) -> None:
        self.name = f"weight noise and back, {self.model}, {self.storage}"
        elements = sum(math.prod(size) for size in self.sizes)
        self.bytes = elements * DTYPES[self.storage].itemsize * 5

    def setup(self, device: torch.device) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        return [
            torch.randn(size, generator=generator, device=device).to(DTYPES[self.storage])
            for size in self.sizes
        ]

    def contenders(self) -> dict[str, Callable[[list[Tensor]], Any]]:
        """Returns fastreg's `WeightNoise`, a loop over parameters, and the same with foreach functions."""
        return {OURS: _ours, "torch": _torch, "torch foreach": _foreach}

    def verify(self, name: str, workload: list[Tensor], run: Any) -> list[Check]:
        """Checks mean and variance of the noise on all weights, and that they are restored bit for bit."""
        before = [p.clone() for p in run.params]
        run.perturb()
        pairs = list(zip(run.params, before, strict=True))
        z = torch.cat([(p.double() - q.double()).flatten() for p, q in pairs]) / STD
        run.restore()
        lost = sum(not torch.equal(p, q) for p, q in pairs)
        # Stochastic rounding to one of two neighbours, a unit in the last place apart, adds this variance.
        n, rounding = z.numel(), torch.finfo(DTYPES[self.storage]).eps ** 2 / 4 / STD**2
        return [
            Check("mean, in σ", abs(float(z.mean())) * math.sqrt(n), FIVE_SIGMA),
            Check(
                "variance, in σ", max(abs(float(z.square().mean()) - 1) - rounding, 0) * math.sqrt(n / 2),
                FIVE_SIGMA,
            ),
            Check("weights that are not back", lost, 0),
        ]  # fmt: skip


def _ours(weights: list[Tensor]) -> Excursion:
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    noise = fastreg.WeightNoise(params, STD)
    return Excursion([p.detach() for p in params], noise.perturb, noise.restore)


def _torch(weights: list[Tensor]) -> Excursion:
    params = [w.clone() for w in weights]
    backups = [torch.empty_like(p) for p in params]

    def perturb() -> None:
        for p, backup in zip(params, backups, strict=True):
            backup.copy_(p)
            p.add_(torch.randn_like(p), alpha=STD)

    def restore() -> None:
        for p, backup in zip(params, backups, strict=True):
            p.copy_(backup)

    return Excursion(params, perturb, restore)


def _foreach(weights: list[Tensor]) -> Excursion:
    params = [w.clone() for w in weights]
    backups = [torch.empty_like(p) for p in params]

    def perturb() -> None:
        torch._foreach_copy_(backups, params)
        torch._foreach_add_(params, [torch.randn_like(p) for p in params], alpha=STD)

    return Excursion(params, perturb, lambda: torch._foreach_copy_(params, backups))


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Returns the cases of activations and of weights.

    Both have four million elements on a CPU.  On a GPU there are 256 million activations, or as many as
    `ACTIVATION_SIZES`, and the weights of GPT-2.
    """
    if device.type == "cuda":
        elements, storages, turns = 2**28, ("bf16", "fp32"), 10 if quick else 50
        model, sizes, smaller = "GPT-2 124M", shapes.gpt2(), ACTIVATION_SIZES
    else:
        elements, storages, turns = 2**22, ("fp32",), 3 if quick else 11
        model, sizes, smaller = "4M in 28 tensors", shapes.gpt2(2, 256, 8192, 512), ()
    return [
        *(NoiseCase(what, elements, storage, turns) for what in KINDS for storage in storages),
        *(NoiseCase("additive noise", size, "bf16", turns) for size in smaller),
        *(WeightNoiseCase(model, sizes, storage, turns) for storage in storages),
    ]
