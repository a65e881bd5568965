"""Runs every kernel, in families that are each one function of a few tensors.

    precompile   compiles them for a target, without a GPU
    sanitize     runs them on few, odd and misaligned tensors
    gpu smoke    runs them on real shapes, against the reference

A family takes `Inputs` and returns a list of tensors; `run` converts them to float32 on the CPU.
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
"""The shape of a tensor: samples, positions, features."""
MOST_POSITIONS = 1024
"""Most positions for which ghost norms are computed: the work grows with their square."""


@dataclass(frozen=True)
class Inputs:
    """The random tensors that a family computes with, and the backend.

    Args:
        dtype: Dtype of all tensors.
        device: Device of all tensors.
        backend: Backend that computes.
        shapes: Shapes of the tensors: samples, positions, features.
        offsets: Elements from the start of an allocation, a multiple of 16 bytes, to the start of a tensor.
        storage: For chains, one of `chains.STORAGES`; by default weights, gradients and state have the dtype.
    """

    dtype: torch.dtype
    device: str
    backend: str
    shapes: Sequence[Shape]
    offsets: Sequence[int] = (0,)
    storage: str | None = None

    def draw(self, count: int) -> Iterator[list[Tensor]]:
        """Yields `count` normal tensors for each shape and offset, the same for every backend of a device."""
        generator = torch.Generator(self.device).manual_seed(0)
        for shape in self.shapes:
            elements = shape[0] * shape[1] * shape[2]
            for offset in self.offsets:  # no tensor uses the memory before a view
                made = (
                    torch.randn(elements + offset, generator=generator, device=self.device)
                    for _ in range(count)
                )
                yield [t.to(self.dtype)[offset:].view(shape) for t in made]

    @property
    def seed(self) -> Tensor:
        """The seed of an operator's random numbers, 0-d."""
        return torch.tensor(7, device=self.device)


Family = Callable[[Inputs], list[Tensor]]


def dropout(inputs: Inputs) -> list[Tensor]:
    """Returns results and gradients of dropout, alone and fused with bias, activations and residuals.

    Dropout alone has one rate, then one for each channel.
    """
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
    """Returns inputs with each kind of noise, with one size, then one for each sample or position."""
    outputs = []
    for (x,) in inputs.draw(1):
        for kind in KINDS:
            outputs.append(noise_ops.noise(x, inputs.seed, torch.tensor(0.3, device=x.device), 1, kind))
            for rows in (x.shape[0], x.shape[0] * x.shape[1]):
                sizes = torch.linspace(0.1, 1, rows, device=x.device)
                outputs.append(noise_ops.noise(x, inputs.seed, sizes, x.numel() // rows, kind))
    return outputs


def weight_noise(inputs: Inputs) -> list[Tensor]:
    """Returns weights with noise, then the weights after the noise was removed."""
    params = [Parameter(x) for (x,) in inputs.draw(1)]
    with fastreg.WeightNoise(params, 0.3, seed=0).perturbed():
        outputs = [p.detach().clone() for p in params]
    return [*outputs, *params]


def penalty(inputs: Inputs) -> list[Tensor]:
    """Returns the L1 and L2 penalties on all tensors, each with its gradients."""
    outputs = []
    params = [Parameter(weight) for (weight,) in inputs.draw(1)]
    for function in (fastreg.l1_penalty, fastreg.l2_penalty):
        value = function(params, 0.3)
        outputs += [value, *torch.autograd.grad(value, params)]
    return outputs


def adversarial(inputs: Inputs) -> list[Tensor]:
    """Returns adversarial inputs after steps in balls of each norm, from clean inputs and from random points.

    Bounds are the same for all features, then tensors with one for each feature.
    """
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
    """Returns weights after two private steps on per-sample gradients; those of one sample are not finite."""
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
    """Returns ghost sums, divided by those of absolute values, and sums over positions.

    The division makes errors relative to the numbers that are added up.
    """
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
    """Returns the weights after two steps of a chain.

    Args:
        chain: Such as "clip+AdamW".
        inputs: Shapes and dtypes of the weights and gradients.
        nonfinite: How the optimizer treats NaN and infinities.
    """
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
        group["lookahead_k"] = 2  # with Lookahead, the second step synchronises
    step = chains.whole_step(optimizer)
    for _ in range(2):
        step()
    return list(params)


def averaged_model(inputs: Inputs) -> list[Tensor]:
    """Returns the averages of a model after two updates of `AveragedModel`."""
    model = torch.nn.ParameterList(Parameter(x) for (x,) in inputs.draw(1))
    average = fastreg.AveragedModel(model)
    with torch.no_grad():
        for _ in range(2):
            for p in model:
                p.mul_(0.5)
            average.update_parameters(model)
    return list(average.parameters())


def lookahead(inputs: Inputs) -> list[Tensor]:
    """Returns weights after Lookahead around torch's SGD has synchronised with the slow weights."""
    params = []
    for weight, gradient in inputs.draw(2):
        params.append(Parameter(weight))
        params[-1].grad = gradient
    optimizer = fastreg.Lookahead(torch.optim.SGD(params, lr=0.1, foreach=False), k=2)
    for _ in range(2):
        optimizer.step()
    return list(params)


def sharpness(inputs: Inputs) -> list[Tensor]:
    """Returns weights after the first and after the second step of SAM and ASAM around torch's SGD."""
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
"""All families by name: the shipped chains without privacy, then the others."""


def run(name: str, inputs: Inputs) -> list[Tensor]:
    """Returns the results of a family as float32 tensors on the CPU, without empty ones."""
    with fastreg.use_backend(inputs.backend):
        outputs = FAMILIES[name](inputs)
    return [t.detach().cpu().float() for t in outputs if t.numel()]


def bound(dtype: torch.dtype, shapes: Sequence[Shape], name: str) -> float:
    """Returns the largest `error` that is allowed for the results of a family."""
    if name == "ghost":  # successive additions, each with an error of up to a unit in the last place
        return max(2 * features + 64 for *_, features in shapes) * 2.0**-23
    # The interpreter truncates to bfloat16, and either result may be off by one unit: two units.
    return 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps


def error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns max|Δ| / max|expected| of the tensor for which it is largest."""
    return max(_off(a, b) for a, b in zip(actual, expected, strict=True))


def _off(a: Tensor, b: Tensor) -> Any:
    return float((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
