"""Builds the contenders of fastreg: the fastest compositions of torch's functions, and other libraries.

All optimizers are imported, except SAM as published, which is on no package index and is written out here.
A composition does what a training loop does by hand: clip, add noise, step, look ahead, average.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import chains
from .suite import OURS, Unavailable

Params = list[Parameter]
LR, WEIGHT_DECAY = 0.05, 1.0
"""Larger than usual, so that each step and each of its parts clearly changes the weights compared."""

_TORCH = {
    "AdamW": (torch.optim.AdamW, {}),
    "SGD": (torch.optim.SGD, {}),
    "SGD-momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD-nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
}


@dataclass
class Step:
    """An optimizer step that can be called, with the results that are verified."""

    run: Callable[[], Any]
    optimizer: Any
    averages: Callable[[], list[torch.Tensor]] = list
    first: float = 0.0  # seconds of the first call, which compiles and makes state
    params: Params = field(default_factory=list)  # if they are not the workload's

    def __call__(self) -> Any:
        return self.run()


Build = Callable[[str, Params, float], Step]
"""Function of a chain, parameters and the largest gradient norm, which returns the step."""


def radius(params: Params) -> float:
    """Returns the radius of perturbations, which move an element by about a tenth of the largest weights."""
    return 0.05 * math.sqrt(sum(p.numel() for p in params))


def fastreg_step(chain: str, params: Params, max_norm: float) -> Step:
    """Returns fastreg's step of a chain, with all parts in one pass."""
    made = chains.optimizer(chain, params, max_norm, radius(params), lr=LR, weight_decay=WEIGHT_DECAY, seed=0)
    run = chains.whole_step(made)
    return Step(run, made, lambda: [made.state[p]["ema"] for p in params] if "EMA" in chain else [])


def composed(chain: str, params: Params, max_norm: float, optimizer: Optimizer) -> Step:
    """Returns an optimizer's step with the other parts of a chain around it, as a training loop runs them.

    Each part is in torch's fastest form: clipping, noise, Lookahead and EMA.
    """
    parts = chain.split("+")
    averages = [p.detach().clone() for p in params] if "EMA" in parts else []
    average = get_ema_multi_avg_fn(chains.DECAY)  # a foreach lerp, as timm's ModelEmaV3 makes it
    slow = [p.detach().clone() for p in params] if "Lookahead" in parts else []
    done = 0

    @torch.no_grad()
    def run() -> None:
        nonlocal done
        if "clip" in parts:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        if "noise" in parts:
            for p in params:
                p.grad.add_(torch.randn_like(p.grad), alpha=chains.STD)
        optimizer.step()
        done += 1
        if slow and done % chains.K == 0:
            torch._foreach_lerp_(slow, params, chains.ALPHA)
            torch._foreach_copy_(params, slow)
        if averages:
            average(averages, [p.detach() for p in params], None)

    return Step(run, optimizer, lambda: averages)


def torch_optimizer(chain: str, params: Params, lr: Any = LR, **implementation: Any) -> Optimizer:
    """Returns torch's optimizer for the update rule of a chain.

    Raises:
        Unavailable: If torch does not have the rule.
    """
    if chains.rule(chain) not in _TORCH:
        raise Unavailable(f"torch has no {chains.rule(chain)}")
    make, settings = _TORCH[chains.rule(chain)]
    return make(params, lr=lr, weight_decay=WEIGHT_DECAY, **settings, **implementation)


def fused(chain: str, params: Params, max_norm: float) -> Step:
    """Returns a composition around torch's optimizer with `fused=True`."""
    return composed(chain, params, max_norm, torch_optimizer(chain, params, fused=True))


def foreach(chain: str, params: Params, max_norm: float) -> Step:
    """Returns a composition around torch's optimizer with `foreach=True`, its default on a GPU."""
    return composed(chain, params, max_norm, torch_optimizer(chain, params, foreach=True))


def grad_scale(chain: str, params: Params, max_norm: float) -> Step:
    """Returns a step with `fused=True` that clips: the kernel divides the gradients by `grad_scale`.

    This saves the pass that scales the gradients.
    """
    if "noise" in chain:
        raise Unavailable("would scale the noise as well")
    optimizer: Any = torch_optimizer(chain, params, fused=True)
    around = composed(chain.removeprefix("clip+"), params, max_norm, optimizer)
    optimizer.found_inf = torch.zeros((), device=params[0].device)

    def run() -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in params]).float()
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp_(min=1.0)
        around()

    return Step(run, optimizer, around.averages)


def compiled(chain: str, params: Params, max_norm: float) -> Step:
    """Returns the composition under `torch.compile`; lr is a tensor, so that schedules do not recompile."""
    lr = torch.tensor(LR, device=params[0].device)
    step = composed(chain, params, max_norm, torch_optimizer(chain, params, lr=lr))
    return Step(torch.compile(step.run), step.optimizer, step.averages)


def optimi(chain: str, params: Params, max_norm: float) -> Step:
    """Returns a composition around optimi's optimizer: in Triton on a GPU, with `foreach=True` on a CPU.

    optimi's default would be a loop over the parameters.
    """
    library = _peer("optimi", "torch-optimi")
    rules = {
        "AdamW": (library.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8}),
        "SGD-momentum": (library.SGD, {"momentum": 0.9, "torch_init": True}),
        "Lion": (library.Lion, {}),
    }
    make, settings = _of(rules, chain, "optimi")
    kernel = {"triton": True} if params[0].device.type == "cuda" else {"foreach": True}
    return composed(
        chain, params, max_norm, make(params, lr=LR, weight_decay=WEIGHT_DECAY, **settings, **kernel)
    )


def flashoptim(chain: str, params: Params, max_norm: float) -> Step:
    """Returns a composition around flashoptim's optimizer, with state in full precision.

    Its state in 8 bits would give other results.
    """
    if params[0].device.type != "cuda":
        raise Unavailable("flashoptim needs CUDA")
    library = _peer("flashoptim", "flashoptim")
    rules = {
        "AdamW": (library.FlashAdamW, {}),
        "SGD-momentum": (library.FlashSGD, {"momentum": 0.9}),
        "Lion": (library.FlashLion, {}),
    }
    make, settings = _of(rules, chain, "flashoptim")
    plain = {"quantize": False, "master_weight_bits": None}
    return composed(
        chain, params, max_norm, make(params, lr=LR, weight_decay=WEIGHT_DECAY, **settings, **plain)
    )


def pytorch_optimizer(chain: str, params: Params, max_norm: float) -> Step:
    """Returns a composition around pytorch_optimizer's Lion; its AdamW and SGD are torch's."""
    library = _peer("pytorch_optimizer", "pytorch-optimizer")
    make, settings = _of({"Lion": (library.Lion, {"foreach": True})}, chain, "pytorch_optimizer")
    return composed(chain, params, max_norm, make(params, lr=LR, weight_decay=WEIGHT_DECAY, **settings))


class PublishedSAM:
    """SAM as github.com/davda54/sam publishes it (MIT licence), around any optimizer.

    It does the same in the same order: it takes the norm of all gradients from those of each, copies each
    weight, and adds the perturbation; then the copy replaces the perturbed weight.
    """

    def __init__(self, base: Optimizer, rho: float, adaptive: bool) -> None:
        self.base, self.rho, self.adaptive = base, rho, adaptive
        self.params = [p for group in base.param_groups for p in group["params"]]
        self.old: list[torch.Tensor] = []

    @torch.no_grad()
    def first_step(self) -> None:
        """Adds the perturbation to the weights, after it has copied them."""
        norms = [((p.abs() if self.adaptive else 1.0) * p.grad).norm(p=2) for p in self.params]
        scale = self.rho / (torch.norm(torch.stack(norms), p=2) + 1e-12)
        self.old = []
        for p in self.params:
            self.old.append(p.data.clone())
            p.add_((p.pow(2) if self.adaptive else 1.0) * p.grad * scale)

    @torch.no_grad()
    def second_step(self) -> None:
        """Restores the weights, and takes the base optimizer's step."""
        for p, old in zip(self.params, self.old, strict=True):
            p.data = old
        self.base.step()


def published_sam(chain: str, params: Params, max_norm: float, **implementation: Any) -> Step:
    """Returns both steps of SAM as published, around torch's optimizer."""
    base = torch_optimizer(chain, params, **implementation)
    made = PublishedSAM(base, radius(params), "ASAM" in chain)
    return Step(chains.whole_step(made), made)


def pytorch_optimizer_sam(chain: str, params: Params, max_norm: float) -> Step:
    """Returns both steps of pytorch_optimizer's SAM, around torch's fused optimizer."""
    library = _peer("pytorch_optimizer", "pytorch-optimizer")
    make, settings = _TORCH[chains.rule(chain)]
    made = library.SAM(
        params, make, rho=radius(params), adaptive="ASAM" in chain, lr=LR, weight_decay=WEIGHT_DECAY,
        fused=True, **settings,
    )  # fmt: skip
    return Step(chains.whole_step(made), made)


def pytorch_optimizer_lookahead(chain: str, params: Params, max_norm: float) -> Step:
    """Returns a step of pytorch_optimizer's Lookahead, around torch's fused optimizer."""
    library = _peer("pytorch_optimizer", "pytorch-optimizer")
    made = library.Lookahead(torch_optimizer(chain, params, fused=True), k=chains.K, alpha=chains.ALPHA)
    return Step(made.step, made)


def averaged_model(chain: str, params: Params, max_norm: float) -> Step:
    """Returns a step of torch's fused optimizer, then of torch's `AveragedModel` with a `foreach` update."""
    model = torch.nn.ParameterList(params)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(chains.DECAY))
    averaged.n_averaged += 1  # the initial weights count: else the first update would copy
    step = fused(chains.without(chain, "EMA"), params, max_norm)

    def run() -> None:
        step()
        averaged.update_parameters(model)

    return Step(run, step.optimizer, lambda: [p.detach() for p in averaged.module.parameters()])


def _peer(module: str, distribution: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(
            f"{distribution} is not installed: pip install 'fastreg[bench]' ({error})"
        ) from None


def _of(rules: dict[str, Any], chain: str, library: str) -> Any:
    if chains.rule(chain) not in rules:
        raise Unavailable(f"{library} has no {chains.rule(chain)} of its own")
    if "noise" in chain:
        raise Unavailable("its state is of another form, in which the noise cannot be verified")
    return rules[chains.rule(chain)]


def contenders(chain: str) -> dict[str, Build]:
    """Returns the contenders for a chain by name: fastreg, then the baseline, then others.

    A contender named "... without PART" runs the chain without that part, to show what the part costs.
    """
    parts = chain.split("+")
    if {"SAM", "ASAM"} & set(parts):
        default = {"davda54": published_sam} if parts == ["SAM", "AdamW"] else {}
        around_fused = partial(published_sam, fused=True)
        return {
            OURS: fastreg_step, baseline(chain): around_fused,
            "pytorch_optimizer + torch fused": pytorch_optimizer_sam, **default,
        }  # fmt: skip
    if "MSAM" in parts:
        return {OURS: fastreg_step, baseline(chain): _leaving_out("MSAM", fused)}
    if "Lookahead" in parts:
        return {
            OURS: fastreg_step, baseline(chain): pytorch_optimizer_lookahead, "torch fused": fused,
            f"{OURS} without Lookahead": _leaving_out("Lookahead", fastreg_step),
        }  # fmt: skip
    clip = "clip" in parts
    named = {
        OURS: fastreg_step,
        baseline(chain): fused if chains.rule(chain) in _TORCH else pytorch_optimizer,
        "torch fused + AveragedModel": averaged_model if parts == ["AdamW", "EMA"] else None,
        "grad_scale + fused": grad_scale if clip else None,
        "torch.compile": compiled if chains.rule(chain) in _TORCH else None,
        "torch foreach": foreach if chains.rule(chain) in _TORCH else None,
        "optimi": optimi,
        "flashoptim": flashoptim,
    }
    return {name: build for name, build in named.items() if build}


def _leaving_out(part: str, build: Build) -> Build:
    return lambda chain, params, max_norm: build(chains.without(chain, part), params, max_norm)


def baseline(chain: str) -> str:
    """Returns the name of a chain's baseline: the fastest way to run it that documentation describes."""
    parts = chain.split("+")
    if {"SAM", "ASAM"} & set(parts):
        return "davda54 + torch fused"
    if "MSAM" in parts:
        return "torch fused without MSAM"
    if "Lookahead" in parts:
        return "pytorch_optimizer + torch fused"
    if chains.rule(chain) not in _TORCH:
        return "pytorch_optimizer"
    return "clip + torch fused" if "clip" in parts else "torch fused"
