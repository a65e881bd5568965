"""Every kernel by families, each one function of a few tensors: to compile, launch, compare and check.

    precompile   compiles them for a target, without a GPU
    sanitize     runs them on few, odd and misaligned tensors
    gpu smoke    runs them on real shapes, against the reference

A family takes `Inputs` and returns what a backend computes, as float32 tensors on the CPU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fastreg
from fastreg.adversarial.ball import Ball
from fastreg.nn import rates
from fastreg.ops import dropout as dropout_ops
from fastreg.ops import ghost as ghost_ops
from fastreg.ops import noise as noise_ops
from fastreg.reference import ghost as ghost_reference
from fastreg.reference.activations import ACTIVATIONS
from fastreg.reference.noise import KINDS

from . import chains

Shape = tuple[int, int, int]
"""Samples, positions, features."""
MOST_POSITIONS = 1024
"""Of ghost norms, whose work grows with their square."""


@dataclass(frozen=True)
class Inputs:
    """What a family works on.

    Args:
        dtype: Of all tensors.
        device: Where they are.
        backend: What runs.
        shapes: Of the tensors: samples, positions, features.
        offsets: Elements between the start of an allocation, a multiple of 16 bytes, and that of a tensor.
        storage: For chains, one of `chains.STORAGES`; by default weights, gradients and state have the dtype.
    """

    dtype: torch.dtype
    device: str
    backend: str
    shapes: Sequence[Shape]
    offsets: Sequence[int] = (0,)
    storage: str | None = None

    def draw(self, count: int) -> Iterator[list[Tensor]]:
        """So many tensors of each shape and offset, the same for every device and backend."""
        generator = torch.Generator(self.device).manual_seed(0)
        for shape in self.shapes:
            elements = shape[0] * shape[1] * shape[2]
            for offset in self.offsets:  # what lies around a view belongs to nobody
                made = (
                    torch.randn(elements + offset, generator=generator, device=self.device)
                    for _ in range(count)
                )
                yield [t.to(self.dtype)[offset:].view(shape) for t in made]

    @property
    def seed(self) -> Tensor:
        """Of the random numbers of an operator."""
        return torch.tensor(7, device=self.device)


Family = Callable[[Inputs], list[Tensor]]


def dropout(inputs: Inputs) -> list[Tensor]:
    """Dropout, with one rate and one for each channel, and with all that is fused around it; gradients."""
    outputs = []
    one = rates.drop_thresholds(0.3, torch.device(inputs.device))
    for *tensors, gradient in inputs.draw(3):
        x, residual = (t.requires_grad_() for t in tensors)
        bias = x.detach()[0, 0].clone().requires_grad_()
        each = rates.drop_thresholds(torch.linspace(0, 1, x.shape[-1]), torch.device(inputs.device))
        for drop_thresholds in (one, each):
            y = dropout_ops.DropoutFunction.apply(x, inputs.seed, drop_thresholds, 1, None)
            outputs += [y, *torch.autograd.grad(y, x, gradient)]
        for activation in ACTIVATIONS:
            y = dropout_ops.FusedDropoutFunction.apply(x, bias, residual, inputs.seed, one, 1, activation)
            outputs += [y, *torch.autograd.grad(y, (x, bias, residual), gradient)]
        y = dropout_ops.FusedDropoutFunction.apply(x, bias, None, inputs.seed, one, 1, "gelu")
        outputs += [y, *torch.autograd.grad(y, (x, bias), gradient)]
        y = dropout_ops.FusedDropoutFunction.apply(x, None, residual, inputs.seed, one, 1, "identity")
        outputs.append(y)
    return outputs


def noise(inputs: Inputs) -> list[Tensor]:
    """Every kind of noise, of one size, and of a size for each sample and position."""
    outputs = []
    for (x,) in inputs.draw(1):
        for kind in KINDS:
            outputs.append(noise_ops.noise(x, inputs.seed, torch.tensor(0.3, device=x.device), 1, kind))
            for rows in (x.shape[0], x.shape[0] * x.shape[1]):
                sizes = torch.linspace(0.1, 1, rows, device=x.device)
                outputs.append(noise_ops.noise(x, inputs.seed, sizes, x.numel() // rows, kind))
    return outputs


def weight_noise(inputs: Inputs) -> list[Tensor]:
    """Noise on weights, there and back."""
    params = [Parameter(x) for (x,) in inputs.draw(1)]
    with fastreg.WeightNoise(params, 0.3, seed=0).perturbed():
        outputs = [p.detach().clone() for p in params]
    return [*outputs, *params]


def penalty(inputs: Inputs) -> list[Tensor]:
    """Both penalties on all tensors, and their gradients."""
    outputs = []
    params = [Parameter(weight) for (weight,) in inputs.draw(1)]
    for function in (fastreg.l1_penalty, fastreg.l2_penalty):
        value = function(params, 0.3)
        outputs += [value, *torch.autograd.grad(value, params)]
    return outputs


def adversarial(inputs: Inputs) -> list[Tensor]:
    """A start and a step in every ball, with bounds for all and for each feature."""
    outputs = []
    for x, gradient in inputs.draw(2):
        x = x.sigmoid()
        low = torch.zeros(1, 1, x.shape[-1], device=x.device, dtype=x.dtype)
        for norm in ("linf", "l2", "l1"):
            for bounds in ((0.0, 1.0), (low, low + 1)):
                ball = Ball(x, 0.1, norm, bounds, steepest=norm == "l1")
                _, point = ball.start(inputs.seed)
                for before in (None, point):
                    outputs += ball.step(before, gradient, ball.epsilon)
        outputs += Ball(x, 0.1, "l1", None).step(None, gradient, torch.tensor([[0.1]], device=x.device))
    return outputs


def private(inputs: Inputs) -> list[Tensor]:
    """Weights after two private steps on gradients held per sample, one of which is not finite."""
    outputs = []
    for clipping, chain in (("flat", "AdamW"), ("flat", "SGD-momentum"), ("per_layer", "clip+AdamW")):
        params, per_sample = [], []
        for weight, *gradients in inputs.draw(4):
            params.append(Parameter(weight))
            per_sample.append(torch.stack([gradients[0], gradients[1] * torch.inf, gradients[2]]))
        base = chains.optimizer(chain, params, lr=0.01, seed=0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="noise_seed")
            optimizer = fastreg.DPOptimizer(
                base, max_grad_norm=5.0, clipping=clipping, expected_batch_size=3, noise_seed=0
            )
        for _ in range(2):
            for p, samples in zip(params, per_sample, strict=True):
                p.grad_sample = samples.clone()  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()
        outputs += params
    return outputs


def ghost_norms(inputs: Inputs) -> list[Tensor]:
    """Ghost norms and sums over positions, as shares of what they would be without signs."""
    outputs = []
    for left, right in inputs.draw(2):
        if left.shape[1] > MOST_POSITIONS:
            continue
        whole = ghost_reference.ghost_sums(left.float().abs(), right.float().abs())
        outputs.append(ghost_ops.ghost_sums(left, right) / whole)
        mean, deviation = left.float().mean(-1), right.float().abs().mean(-1)
        for others in ((left, right, mean, deviation), (left, right), (left,)):
            outputs += [t for t in ghost_ops.sample_sums(*others) if t is not None]
    return outputs


def stepped(chain: str, inputs: Inputs, nonfinite: str = "propagate") -> list[Tensor]:
    """Weights after the steps of a chain: two, or three where something is not due at every one."""
    params = []
    for weight, gradient in inputs.draw(2):
        params.append(Parameter(weight))
        params[-1].grad = gradient
    _, bf16, state_dtype = chains.STORAGES[inputs.storage] if inputs.storage else (None, None, None)
    optimizer = chains.optimizer(
        chain,
        params,
        lr=0.01,
        seed=0,
        nonfinite=nonfinite,
        bf16=bf16 or "stochastic",
        state_dtype=state_dtype,
    )
    for group in optimizer.param_groups:
        group["lookahead_k"] = 2  # where there is one, the second step synchronises
    step = chains.whole_step(optimizer)
    for _ in range(2):
        step()
    return list(params)


def averaged_model(inputs: Inputs) -> list[Tensor]:
    """The averages of a model after two updates."""
    model = torch.nn.ParameterList(Parameter(x) for (x,) in inputs.draw(1))
    average = fastreg.AveragedModel(model)
    with torch.no_grad():
        for _ in range(2):
            for p in model:
                p.mul_(0.5)
            average.update_parameters(model)
    return list(average.parameters())


def lookahead(inputs: Inputs) -> list[Tensor]:
    """Weights after the slow ones have been synchronised around an optimizer of torch."""
    params = []
    for weight, gradient in inputs.draw(2):
        params.append(Parameter(weight))
        params[-1].grad = gradient
    optimizer = fastreg.Lookahead(torch.optim.SGD(params, lr=0.1, foreach=False), k=2)
    for _ in range(2):
        optimizer.step()
    return list(params)


def sharpness(inputs: Inputs) -> list[Tensor]:
    """Weights between and after both steps of SAM and ASAM around an optimizer of torch."""
    outputs = []
    for adaptive in (False, True):
        params = []
        for weight, gradient in inputs.draw(2):
            params.append(Parameter(weight))
            params[-1].grad = gradient
        optimizer = fastreg.SAM(params, torch.optim.SGD, adaptive=adaptive, lr=0.1)
        optimizer.first_step()
        outputs += [p.detach().clone() for p in params]
        optimizer.second_step()
        outputs += params
    return outputs


def _chains() -> dict[str, Family]:
    named = (chain for chain in chains.BUDGETS if "dp" not in chain.split("+"))
    return {chain: functools.partial(stepped, chain) for chain in named}


FAMILIES: dict[str, Family] = {
    **_chains(),
    "dropout": dropout,
    "noise": noise,
    "weight noise": weight_noise,
    "penalty": penalty,
    "adversarial": adversarial,
    "private": private,
    "ghost": ghost_norms,
    "AveragedModel": averaged_model,
    "Lookahead": lookahead,
    "SAM": sharpness,
}
"""By name: the shipped chains, then everything else."""


def run(name: str, inputs: Inputs) -> list[Tensor]:
    """What a family computes, without what has no elements."""
    with fastreg.use_backend(inputs.backend):
        outputs = FAMILIES[name](inputs)
    return [t.detach().cpu().float() for t in outputs if t.numel()]


def bound(dtype: torch.dtype, shapes: Sequence[Shape], name: str) -> float:
    """How far a result may be off, as a share of the largest element of its tensor."""
    if name == "ghost":  # additions in a row, each of which may lose a unit in the last place
        return max(2 * features + 64 for *_, features in shapes) * 2.0**-23
    # The interpreter truncates to bfloat16, and either may round the other way: one unit, twice.
    return 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps


def error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """max|Δ| / max|expected| of the worst tensor."""
    return max(_off(a, b) for a, b in zip(actual, expected, strict=True))


def _off(a: Tensor, b: Tensor) -> Any:
    return float((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
