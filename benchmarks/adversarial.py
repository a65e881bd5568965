"""Times steps of adversarial attacks, for given gradients, against steps written in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastreg.adversarial.ball import Ball

from .steps import DTYPES
from .suite import OURS, Case, Check

EPSILON = {"linf": 8 / 255, "l2": 1.0}
IMAGE = 3, 128, 128


@dataclass
class Workload:
    """Clean images, the points of an attack, and the gradients at these points."""

    clean: Tensor
    point: Tensor
    gradient: Tensor
    epsilon: float

    @property
    def size(self) -> float:
        """The step size of PGD, with which steps from the edge of the ball leave the ball."""
        return self.epsilon / 4


@dataclass(eq=False)  # hashed by identity
class AttackCase(Case):
    """A step of FGSM or PGD on images; `norm` is "linf" or "l2"."""

    attack: str
    norm: str
    images: int
    storage: str
    rounds: int
    suite: str = "adversarial"
    baseline: str = "torch"

    def __post_init__(self) -> None:
        elements = self.images * IMAGE[0] * IMAGE[1] * IMAGE[2]
        self.name = f"{self.attack} step, {self.norm}, {elements / 2**20:.0f}M {self.storage}"
        # Points and gradient read, points written; for PGD the clean images read, too.  For L2 the gradient
        # is read again for its norm, and for PGD all three inputs for the norm of the perturbation.
        passes = 3 + (self.attack == "PGD") + (self.norm == "l2") * (1 + 3 * (self.attack == "PGD"))
        self.bytes = elements * DTYPES[self.storage].itemsize * passes

    def setup(self, device: torch.device) -> Workload:
        generator = torch.Generator(device).manual_seed(0)
        shape, dtype, epsilon = (self.images, *IMAGE), DTYPES[self.storage], EPSILON[self.norm]
        clean = torch.rand(shape, generator=generator, device=device).to(dtype)
        gradient = torch.randn(shape, generator=generator, device=device).to(dtype)
        point = clean
        if self.attack == "PGD":
            away = torch.randn(shape, generator=generator, device=device)
            away = (
                away.sign()
                if self.norm == "linf"
                else away / away.flatten(1).norm(dim=1)[:, None, None, None]
            )
            point = (clean + epsilon * away).clamp(0, 1).to(dtype)
        return Workload(clean, point, gradient, epsilon)

    def contenders(self) -> dict[str, Callable[[Workload], Any]]:
        """Returns fastreg's step, and one written in PyTorch, eager and compiled."""
        plain = functools.partial(_composite, self.attack == "PGD", self.norm)
        return {
            OURS: lambda workload: self._ours(workload),
            "torch": lambda workload: _of(workload, plain),
            "torch.compile": lambda workload: _of(workload, torch.compile(plain)),
        }

    def _ours(self, workload: Workload) -> Callable[[], Tensor]:
        ball = Ball(workload.clean, workload.epsilon, self.norm, (0.0, 1.0))
        if self.attack == "FGSM":
            return lambda: ball.layout.unflatten(ball.step(None, workload.gradient, ball.epsilon)[0])
        point, size = ball.layout.flatten(workload.point), ball.per_sample("size", workload.size)
        return lambda: ball.layout.unflatten(ball.step(point, workload.gradient, size)[0])

    def verify(self, name: str, workload: Workload, run: Any) -> list[Check]:
        """Compares with a float64 step; 16-bit results may be rounded to either side."""
        wide = (t.double() for t in (workload.clean, workload.point, workload.gradient))
        size = workload.size if self.attack == "PGD" else workload.epsilon
        exact = _composite(self.attack == "PGD", self.norm, *wide, workload.epsilon, size)
        bound = 1e-6 if self.storage == "fp32" else torch.finfo(DTYPES[self.storage]).eps
        if name != OURS:
            bound *= 4  # they round after each operation
        return [Check("images", float((run().double() - exact).abs().max()), bound)]


def _of(workload: Workload, function: Callable[..., Tensor]) -> Callable[[], Tensor]:
    size = workload.epsilon if workload.point is workload.clean else workload.size
    arguments = workload.clean, workload.point, workload.gradient, workload.epsilon, size
    return lambda: function(*arguments)


def _composite(
    project: bool, norm: str, clean: Tensor, point: Tensor, gradient: Tensor, epsilon: float, size: float
) -> Tensor:
    """Returns the points after a step as it is usually written in PyTorch."""

    def norms(t: Tensor) -> Tensor:
        return t.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)

    step = gradient.sign() if norm == "linf" else gradient / norms(gradient)
    moved = point + size * step
    if project:
        away = moved - clean
        away = (
            away.clamp(-epsilon, epsilon) if norm == "linf" else away * (epsilon / norms(away)).clamp(max=1)
        )
        moved = clean + away
    return moved.clamp(0, 1)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Returns cases of four million elements on a CPU, 201 million on a GPU."""
    if device.type != "cuda":
        turns = 5 if quick else 21
        return [AttackCase("PGD", norm, 86, "fp32", turns) for norm in (("linf",) if quick else EPSILON)]
    turns = 10 if quick else 50
    return [
        AttackCase(attack, norm, 4096, storage, turns)
        for attack, storage in (("PGD", "fp32"), ("FGSM", "fp32"), ("FGSM", "bf16"))
        for norm in EPSILON
    ]
