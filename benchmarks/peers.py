"""What a user would run instead of fastreg: the best compositions of torch's parts, and other libraries.

All of it is imported, none written anew.  A composition is what a training loop does by hand: clip, add
noise, step, average.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from . import chains
from .suite import OURS, Unavailable

Params = list[Parameter]
LR, WEIGHT_DECAY = 0.05, 1.0
"""Large, so that each step, and each part of it, shows in the weights that are compared."""

_TORCH = {
    "AdamW": (torch.optim.AdamW, {}),
    "SGD": (torch.optim.SGD, {}),
    "SGD-momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "SGD-nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
}


@dataclass
class Step:
    """One optimizer step, with what it leaves behind to be verified."""

    run: Callable[[], Any]
    optimizer: Optimizer
    averages: Callable[[], list[torch.Tensor]] = list
    first: float = 0.0  # seconds of the first call: compilation, and making state

    def __call__(self) -> Any:
        return self.run()


Build = Callable[[str, Params, float], Step]
"""Makes the step of a chain on some parameters, clipped to a norm."""


def fastreg_step(chain: str, params: Params, max_norm: float) -> Step:
    """Everything in one pass."""
    made = chains.optimizer(chain, params, max_norm, lr=LR, weight_decay=WEIGHT_DECAY, seed=0)
    return Step(made.step, made, lambda: [made.state[p]["ema"] for p in params] if "EMA" in chain else [])


def composed(chain: str, params: Params, max_norm: float, optimizer: Optimizer) -> Step:
    """What a training loop does around an optimizer's step, in torch's fastest form of each part."""
    parts = chain.split("+")
    averages = [p.detach().clone() for p in params] if "EMA" in parts else []
    average = get_ema_multi_avg_fn(chains.DECAY)

    @torch.no_grad()
    def run() -> None:
        if "clip" in parts:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        if "noise" in parts:
            for p in params:
                p.grad.add_(torch.randn_like(p.grad), alpha=chains.STD)
        optimizer.step()
        if averages:
            average(averages, [p.detach() for p in params], None)

    return Step(run, optimizer, lambda: averages)


def torch_optimizer(chain: str, params: Params, lr: Any = LR, **implementation: Any) -> Optimizer:
    """torch's optimizer for the rule of a chain."""
    if chains.rule(chain) not in _TORCH:
        raise Unavailable(f"torch has no {chains.rule(chain)}")
    make, settings = _TORCH[chains.rule(chain)]
    return make(params, lr=lr, weight_decay=WEIGHT_DECAY, **settings, **implementation)


def fused(chain: str, params: Params, max_norm: float) -> Step:
    """`fused=True`."""
    return composed(chain, params, max_norm, torch_optimizer(chain, params, fused=True))


def foreach(chain: str, params: Params, max_norm: float) -> Step:
    """`foreach=True`, what torch takes by default on a GPU."""
    return composed(chain, params, max_norm, torch_optimizer(chain, params, foreach=True))


def grad_scale(chain: str, params: Params, max_norm: float) -> Step:
    """The norm, then `fused=True` told to divide by it: saves the pass that scales the gradients."""
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
    """The whole composition through `torch.compile`; lr is a tensor, so a schedule does not recompile."""
    lr = torch.tensor(LR, device=params[0].device)
    step = composed(chain, params, max_norm, torch_optimizer(chain, params, lr=lr))
    return Step(torch.compile(step.run), step.optimizer, step.averages)


def optimi(chain: str, params: Params, max_norm: float) -> Step:
    """optimi, in Triton where it can: its own default would take the loop over parameters."""
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
    """flashoptim, with state in full precision: what it stores in 8 bits gives other results."""
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
    """pytorch_optimizer, for the rules that are its own."""
    library = _peer("pytorch_optimizer", "pytorch-optimizer")
    make, settings = _of({"Lion": (library.Lion, {"foreach": True})}, chain, "pytorch_optimizer")
    return composed(chain, params, max_norm, make(params, lr=LR, weight_decay=WEIGHT_DECAY, **settings))


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
    """Those who can run a chain, torch's best composition first after ours."""
    clip = "clip" in chain.split("+")
    named = {
        OURS: fastreg_step,
        baseline(chain): fused if chains.rule(chain) in _TORCH else pytorch_optimizer,
        "grad_scale + fused": grad_scale if clip else None,
        "torch.compile": compiled if chains.rule(chain) in _TORCH else None,
        "torch foreach": foreach if chains.rule(chain) in _TORCH else None,
        "optimi": optimi,
        "flashoptim": flashoptim,
    }
    return {name: build for name, build in named.items() if build}


def baseline(chain: str) -> str:
    """What the others are compared with: torch's fastest composition that its documentation tells of."""
    if chains.rule(chain) not in _TORCH:
        return "pytorch_optimizer"
    return "clip + torch fused" if "clip" in chain.split("+") else "torch fused"
