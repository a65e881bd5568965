"""Defines the case of one optimizer step over a model's parameters, the base of several suites."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fastreg

from . import chains, measure, peers, shapes
from .suite import OURS, Case, Check, Unavailable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SCALES = (1.0, 4.0, 0.5)
"""Factors of the gradients in the three steps that are verified: clipped, clipped more, not clipped.

They are powers of two, so that scaling does not round."""
BOUNDS = {"fp32": 1e-6, "bf16": len(SCALES) * 2**-7}
"""Largest errors allowed after these steps, relative to the largest weight of a tensor.

In bf16 this is a unit in the last place for each step: so much stochastic rounding may be off, and so may
rounding to nearest twice a step, as foreach does."""
LOOSE = 1e-2
"""Bound for other contenders that clip: on a CPU torch's own norm of 38 M elements is off by 0.3 %."""


@dataclass
class Workload:
    """Parameters with gradients, the initial values of both, and the results expected after three runs."""

    params: list[Parameter]
    start: list[Tensor]
    gradients: list[Tensor]
    max_norm: float
    weights: list[Tensor]
    averages: list[Tensor]
    plain: list[Tensor] = field(default_factory=list)  # expected weights of the chain without `part`

    @torch.no_grad()
    def reset(self) -> None:
        """Restores the initial weights and gradients."""
        torch._foreach_copy_(self.params, self.start)
        self.scale(SCALES[0])

    @torch.no_grad()
    def scale(self, scale: float) -> None:
        """Sets the gradients to the initial ones times a factor."""
        gradients = [p.grad for p in self.params]
        torch._foreach_copy_(gradients, self.gradients)
        torch._foreach_mul_(gradients, scale)


@dataclass(eq=False)  # hashed by identity
class StepCase(Case):
    """The step of a chain over the tensors of a model.

    Args:
        suite: The suite that it belongs to.
        chain: Such as "clip+AdamW".
        model: Name of the model that has these tensors.
        sizes: Shapes of the tensors.
        storage: "fp32", or "bf16" for weights, gradients and state alike.
        rounds: How often each contender is timed.
        compiles: Whether to measure `torch.compile` of the whole composition, which takes long.
        part: The part that contenders named "... without PART" leave out.
        steps: Steps of a run.
    """

    suite: str
    chain: str
    model: str
    sizes: shapes.Sizes
    storage: str = "fp32"
    rounds: int = 11
    compiles: bool = False
    part: str = ""
    steps: int = 1

    def __post_init__(self) -> None:
        self.name = f"{self.chain}, {self.model}, {self.storage}"
        self.baseline = peers.baseline(self.chain)
        self.elements = sum(map(math.prod, self.sizes))
        self.shipped = chains.at(self.chain, self.storage, weight_decay=peers.WEIGHT_DECAY)
        self.bytes = self.elements * self.shipped.bytes_with_norm

    def setup(self, device: torch.device) -> Workload:
        self._check_memory(device)
        generator = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[self.storage]

        def draw(scale: float) -> list[Tensor]:
            return [
                torch.randn(size, generator=generator, device=device).mul_(scale).to(dtype)
                for size in self.sizes
            ]

        start, gradients = draw(0.1), draw(1.0)
        params = [Parameter(weight.clone()) for weight in start]
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient.clone()
        workload = Workload(params, start, gradients, 0.8 * math.sqrt(self.elements), [], [])
        if "noise" not in self.chain:
            workload.weights, workload.averages = self._judge(workload, self.chain)
        if self.part:
            workload.plain, _ = self._judge(workload, chains.without(self.chain, self.part))
        return workload

    def _check_memory(self, device: torch.device) -> None:
        """Raises `Unavailable` if memory is short.

        Each contender has its own state, and foreach takes as much again as the weights.
        """
        weight, _, *state = (dtype.itemsize for dtype in self.shipped.dtypes)
        needed = self.elements * ((len(self.contenders()) + 2) * max(sum(state), 4) + 6 * weight)
        free = measure.free_memory(device)
        if needed > free:
            raise Unavailable(f"needs {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free")

    def _judge(self, workload: Workload, judged: str) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the expected weights and averages after three runs of a chain, in float32.

        They come from torch's loop over parameters; for rules that torch does not have, from fastreg's
        reference.  Gradients are clipped here, with the norm in float64.
        """
        params = [Parameter(weight.to(torch.float32, copy=True)) for weight in workload.start]
        chain = chains.without(judged, "clip")
        try:
            step = peers.composed(
                chain, params, workload.max_norm, peers.torch_optimizer(chain, params, foreach=False)
            )
        except Unavailable:
            step = peers.fastreg_step(chain, params, workload.max_norm)
        norm = whole_norm(workload.gradients)
        with fastreg.use_backend("reference"):
            for scale in SCALES:
                factor = min(1.0, workload.max_norm / (scale * norm + 1e-6)) if chain != judged else 1.0
                for p, gradient in zip(params, workload.gradients, strict=True):
                    p.grad = gradient.to(torch.float32, copy=True).mul_(scale * factor)
                for _ in range(self.steps):
                    step()
        return [p.detach() for p in params], [average.detach() for average in step.averages()]

    def contenders(self) -> dict[str, Callable[[Workload], peers.Step]]:
        """Returns fastreg's step, torch's compositions, and other libraries' steps."""
        return {name: partial(self._build, name) for name in peers.contenders(self.chain)}

    def _build(self, name: str, workload: Workload) -> peers.Step:
        if name == "torch.compile" and not self.compiles:
            raise Unavailable("takes long to compile: measured on one case, on a CPU of the full run only")
        workload.reset()
        step = peers.contenders(self.chain)[name](self.chain, workload.params, workload.max_norm)
        if self.steps == 1:
            return step
        return replace(step, run=lambda: [step.run() for _ in range(self.steps)])

    def verify(self, name: str, workload: Workload, run: Any) -> list[Check]:
        """Compares three runs from the start with the expected weights and averages.

        For a chain with noise, checks the statistics of the noise and the clip factor after one run.
        """
        loose = name != OURS and "clip" in self.chain
        if self.part and name.endswith(f" without {self.part}"):
            workload = replace(workload, weights=workload.plain, averages=[])
        workload.reset()
        run.first = measure.Clock(workload.params[0].device).wall(run)
        if "noise" in self.chain:
            return self._noise(workload, run, LOOSE if loose else 1e-5)
        for scale in SCALES[1:]:
            workload.scale(scale)
            run()
        bound = max(BOUNDS[self.storage], LOOSE * loose)
        checks = [
            Check("weights", difference([p.detach() for p in workload.params], workload.weights), bound)
        ]
        if workload.averages:
            checks.append(Check("averages", difference(run.averages(), workload.averages), bound))
        return checks

    def _noise(self, workload: Workload, run: Any, bound: float) -> list[Check]:
        """Checks noise and clip factor from the first moment, 0.1 · (factor · gradient + noise)."""
        norm, along = whole_norm(workload.gradients), 0.0
        moments = [run.optimizer.state[p]["exp_avg"].double() / 0.1 for p in workload.params]
        for moment, gradient in zip(moments, workload.gradients, strict=True):
            along += float((moment * gradient).sum())
        factor = along / norm**2
        mean = square = 0.0
        for moment, gradient in zip(moments, workload.gradients, strict=True):
            drawn = (moment - factor * gradient) / chains.STD
            mean += float(drawn.sum()) / self.elements
            square += float(drawn.square().sum()) / self.elements
        exact = min(1.0, workload.max_norm / (norm + 1e-6))
        statistical = 6 / math.sqrt(self.elements)
        return [
            Check("noise", max(abs(mean), abs(square - 1)), math.sqrt(2) * statistical),
            Check("clip factor", abs(factor / exact - 1), bound + chains.STD * statistical),
        ]

    def details(self, workload: Workload, run: Any) -> dict[str, Any]:
        """Returns the milliseconds of the first run, which compiles what caches do not hold."""
        return {"first_ms": 1e3 * run.first}


def whole_norm(tensors: list[Tensor]) -> float:
    """Returns the norm of all tensors together, in float64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Returns max|Δ| / max|expected| of the worst tensor, without empty ones.

    It is infinite if the numbers of tensors differ.
    """
    if len(actual) != len(expected):
        return math.inf
    worst = [
        (a.float() - b).abs().max() / b.abs().max()
        for a, b in zip(actual, expected, strict=True)
        if b.numel()
    ]
    return float(torch.stack(worst).max()) if worst else 0.0


def models(device: torch.device, quick: bool) -> dict[str, tuple[str, shapes.Sizes]]:
    """Returns the models for a device by key: a name for the table and the shapes of the parameters."""
    gpu = device.type == "cuda"
    small = quick and not gpu
    return {
        "gpt2": ("GPT-2 36M", shapes.gpt2(4, vocabulary=8192)) if small else ("GPT-2 124M", shapes.gpt2()),
        "llama": ("Llama 1B", shapes.llama()),
        "many": ("300 small", shapes.many_small(300)) if small else ("1000 small", shapes.many_small()),
        "huge": ("one of 268M", shapes.one_huge()) if gpu else ("one of 67M", shapes.one_huge(2**26)),
    }


def rounds(device: torch.device, quick: bool) -> int:
    """Returns how often to time each contender on a device."""
    return (20 if quick else 50) if device.type == "cuda" else (5 if quick else 11)
