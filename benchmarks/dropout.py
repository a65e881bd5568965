"""Times both passes of dropout with the functions fused around it, and counts the bytes kept in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import fastreg
from fastreg.nn.functional import bias_act_dropout_add, dropout

from .activation import saved_bytes
from .steps import DTYPES
from .suite import OURS, Case, Check, Unavailable

P, FEATURES = 0.1, 1024
ACTIVATION_SIZES = 3 * 2**19, 6 * 2**20, 24 * 2**20
"""Elements of 2, 8 and 32 samples of 1024 positions and 768 features.  The first two fit into a GPU's cache,
where activations are in a model right after the layer that computes them."""


@dataclass
class Workload:
    """Inputs, which take gradients, and the gradient of the result."""

    x: Tensor
    bias: Tensor
    residual: Tensor
    gradient: Tensor


@dataclass
class BothPasses:
    """A run of the forward and backward pass of a function of (x, bias, residual)."""

    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    workload: Workload
    backend: str = "auto"

    def __call__(self) -> tuple[Tensor, ...]:
        inputs = self.workload.x, self.workload.bias, self.workload.residual
        with fastreg.use_backend(self.backend):
            y = self.function(*inputs)
            return y, *torch.autograd.grad(y, inputs, self.workload.gradient, allow_unused=True)


@dataclass(eq=False)  # hashed by identity
class PassCase(Case):
    """A function of `[rows, 1024]`; `what` is "dropout" or "bias+gelu+dropout+add"."""

    what: str
    elements: int
    storage: str
    rounds: int
    suite: str = "dropout"
    baseline: str = "torch"

    def __post_init__(self) -> None:
        size = f"{self.elements / 2**20:g}M {self.storage}"
        self.name = f"{self.what}, {size}, both passes"
        # Forward: x, and a residual, read; y written.  Backward: the gradient, and x for GELU, read; the
        # gradient of x written.  That of the residual is the gradient itself.
        passes = 2 + 2 if self.what == "dropout" else 3 + 3
        self.bytes = self.elements * DTYPES[self.storage].itemsize * passes

    def setup(self, device: torch.device) -> Workload:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            made = torch.randn(shape, generator=generator, device=device)
            return made.to(DTYPES[self.storage]).requires_grad_()

        shape = self.elements // FEATURES, FEATURES
        return Workload(draw(*shape), draw(FEATURES), draw(*shape), draw(*shape).detach())

    def contenders(self) -> dict[str, Callable[[Workload], Any]]:
        """Returns fastreg's function, its reference, and torch's functions, eager and compiled."""
        plain = self.what == "dropout"
        ours = _dropout if plain else _fused
        theirs = _torch_dropout if plain else _torch_fused
        return {
            OURS: lambda workload: BothPasses(ours, workload),
            f"{OURS}, reference": lambda workload: _reference(ours, workload),
            "torch": lambda workload: BothPasses(theirs, workload),
            "torch.compile": lambda workload: BothPasses(torch.compile(theirs), workload),
        }

    def verify(self, name: str, workload: Workload, run: Any) -> list[Check]:
        """Checks the share of kept elements, their values, and their gradient."""
        y, of_x, *_ = (t if t is None else t.detach().double() for t in run())
        x = workload.x.detach().double().requires_grad_()
        if self.what == "dropout":
            branch, rest = x, 0
        else:
            branch, rest = (
                functional.gelu(x + workload.bias.detach().double()),
                workload.residual.detach().double(),
            )
        (slope,) = torch.autograd.grad(branch.sum(), x)
        kept, full = of_x != 0, rest + branch.detach() / (1 - P)
        share = abs(float(kept.double().mean()) - (1 - P)) / (P * (1 - P) / self.elements) ** 0.5
        wrong = float((y - torch.where(kept, full, rest)).abs().amax() / full.abs().amax())
        g = workload.gradient.double() * slope / (1 - P)
        off = float((of_x - torch.where(kept, g, 0)).abs().amax() / g.abs().amax())
        bound = {"fp32": 1e-4, "bf16": 2e-2}[self.storage]
        return [
            Check("share kept, in σ", share, 5),
            Check("result", wrong, bound),
            Check("gradient", off, bound),
        ]

    def details(self, workload: Workload, run: Any) -> dict[str, Any]:
        """Returns the bytes kept for the backward pass, without those of the inputs."""
        inputs = workload.x, workload.bias, workload.residual
        with saved_bytes(inputs) as saved, fastreg.use_backend(run.backend):
            run.function(*inputs)
        return {"saved_bytes": saved.bytes}


def _dropout(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return dropout(x, P)


def _fused(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return bias_act_dropout_add(x, bias, residual, P, activation="gelu")


def _torch_dropout(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return functional.dropout(x, P)


def _torch_fused(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return residual + functional.dropout(functional.gelu(x + bias), P)


def _reference(function: Any, workload: Workload) -> BothPasses:
    if workload.x.device.type != "cpu":
        raise Unavailable("the reference is for a CPU")
    return BothPasses(function, workload, "reference")


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Returns cases of four million elements on a CPU; of 256 million and `ACTIVATION_SIZES` on a GPU."""
    if device.type == "cuda":
        turns = 10 if quick else 50
        sizes = [(2**28, "bf16"), *((size, "bf16") for size in ACTIVATION_SIZES), (2**28, "fp32")]
    else:
        sizes, turns = [(2**22, "fp32")], 5 if quick else 21
    return [PassCase(what, *size, turns) for what in ("dropout", "bias+gelu+dropout+add") for size in sizes]
