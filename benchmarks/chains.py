"""Lists the chains that fastreg ships, for the code audit and the benchmarks.

Each row says how many bytes a step must move and how many instructions it may take.  Bytes per parameter
follow from the dtypes.  Budgets of instructions are for sm_90: within them a step is bound by memory, not by
the issue of instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

import fastreg
from fastreg.engine.multi_tensor_optimizer import MultiTensorOptimizer
from fastreg.engine.stage import Chain
from fastreg.optim import registry
from fastreg.optim.model_average import UpdateAverages
from fastreg.optim.perturb import Restore
from fastreg.privacy.noise import NoiseKey, PrivateNoise

MAX_NORM, VALUE, STD, STRENGTH, DECAY, RHO, K, ALPHA = 1.0, 1.0, 0.01, 1e-3, 0.999, 0.05, 5, 0.5


class Shipped(NamedTuple):
    """A chain at a combination of dtypes, with its budget in the code audit."""

    name: str
    storage: str  # one of `STORAGES`
    chain: Chain
    dtypes: tuple[torch.dtype, ...]
    budget: float  # instructions per parameter on sm_90

    @property
    def bytes(self) -> int:
        """Bytes per parameter: weight and state read and written, gradient read."""
        return sum(moved(self.chain, self.dtypes))

    @property
    def bytes_with_norm(self) -> int:
        """Bytes per parameter, with those read for norms: of clipped gradients, and of MSAM's momentum."""
        parts = self.name.split("+")
        momentum = momentum_read(self.chain, self.dtypes) if "MSAM" in parts else 0
        return self.bytes + self.dtypes[1].itemsize * ("clip" in parts) + momentum


OPTIMIZERS = {
    name: (entry.optimizer, options)
    for entry in registry.OPTIMIZERS.values()
    for name, options in entry.variants.items()
}
COMPONENTS: dict[str, Callable[[float, float], Any]] = {
    "clip": lambda max_norm, rho: fastreg.ClipNorm(max_norm),
    "adaptive": lambda *_: fastreg.AdaptiveClip(),
    "value": lambda *_: fastreg.ClipValue(VALUE),
    "noise": lambda *_: fastreg.GradientNoise(STD),
    "relative": lambda *_: fastreg.GradientNoise(STD, relative=True),
    "L2SP": lambda *_: fastreg.L2SP(STRENGTH),
    "L1": lambda *_: fastreg.L1(STRENGTH),
    "EMA": lambda *_: fastreg.EMA(DECAY),
    "SWA": lambda *_: fastreg.SWA(),
    "Lookahead": lambda *_: fastreg.SlowWeights(K, ALPHA),
    "pullback": lambda *_: fastreg.SlowWeights(K, ALPHA, "pullback"),
    "MSAM": lambda max_norm, rho: fastreg.MSAM(rho),
    "dp": lambda *_: PrivateNoise(NoiseKey()),
}
"""Other parts that the name of a chain may hold, besides SAM and ASAM; each is made from max_norm and rho."""
READ_ONLY = ("l2_sp_start", "slow_momentum")
"""Buffers that a pass does not write."""
WRITE_ONLY = ("sam_backup", "rounded", "slow_momentum")
"""Buffers that a stage does not read: the compiler drops the loads.  The pass does not touch buffers in both
lists; another pass updates them."""
GRADIENT_FREE = ("regularizers.lookahead", "ascent.noise")
"""Stages that do not use the gradient; a chain of such stages only does not read it."""

STORAGES = {
    "fp32": (torch.float32, "stochastic", None),
    "mixed": (torch.bfloat16, "stochastic", torch.float32),
    "bf16": (torch.bfloat16, "stochastic", None),
    "remainder": (torch.bfloat16, "remainder", None),
}
"""Dtype of weights and gradients, mode of bf16 weights, and dtype of the state if it is another."""

# Instructions per parameter on sm_90, for each of the storages.  For SAM they are those of the base
# optimizer's step, which reads the backup; for Lookahead those of a step that synchronizes.
BUDGETS = {
    "AdamW": (30, 50.5, 49.5, 42.5),
    "clip+AdamW": (31.5, 52, 50.5, 43),
    "clip+AdamW+EMA": (41, 61.5, 61.5, 52.5),
    "clip+noise+AdamW+EMA": (84, 106, 106.5, 99),
    "SGD": (9.5, 26, 26, 17),
    "SGD-momentum": (13.5, 32.5, 31.5, 25),
    "SGD-nesterov": (16.5, 35, 33.5, 27),
    "Lion": (20, 38, 37, 30.5),
    "Adam-amsgrad": (33, 55, 53.5, 45),
    "AdamW-cautious+L1": (37.5, 58, 56.5, 49.5),
    "adaptive+SGD-momentum": (54, 73.5, 71, 64),
    "value+relative+L2SP+AdamW": (82, 104, 102.5, 97),
    "AdamW+SWA": (39, 60, 60, 51),
    "AdamW+Lookahead": (35, 56.5, 56.5, 47),
    "AdamW+pullback": (35, 56.5, 56.5, 47),
    "SAM+SGD-momentum": (14, 32.5, 32, 24.5),
    "SAM+AdamW": (30.5, 50, 49.5, 43),
    "MSAM+SGD-momentum": (15.5, 34.5, 33.5, 27),
    "MSAM+SGD-momentum-decay": (15.5, 34.5, 33.5, 27),
    "MSAM+AdamW": (32, 52.5, 51, 44),
    "dp+AdamW": (84, 103.5, 103, 97.5),
    "dp+SGD-momentum": (67.5, 86, 84.5, 79.5),
    "dp+clip+AdamW": (85, 104.5, 104, 98.5),
}

# Instructions per parameter on sm_90 of passes outside the step, for weights in float32 and in bfloat16.
PASSES = {
    "SAM climb": (11.5, 26.5),
    "ASAM climb": (16, 31),
    "SAM restore": (5.2, 3.3),
    "weight noise": (47.5, 62),
    "Lookahead sync": (11, 14.5),
    "AveragedModel": (14, 18),
}


def without(name: str, part: str) -> str:
    """Returns the name of a chain without one of its parts."""
    return "+".join(other for other in name.split("+") if other != part)


def known(name: str) -> bool:
    """Returns whether a chain of this name can be made and stepped without `DPOptimizer`.

    It must have one update rule, and other parts at most once each.
    """
    parts = name.split("+")
    others = [part for part in parts if part not in OPTIMIZERS]
    possible = (COMPONENTS.keys() - {"dp"}) | {"SAM", "ASAM"}
    return len(parts) == len(others) + 1 and set(others) <= possible and len(set(others)) == len(others)


def rule(name: str) -> str:
    """Returns the update rule of a chain: "AdamW" of "clip+AdamW+EMA"."""
    (result,) = set(name.split("+")) & OPTIMIZERS.keys()
    return result


def moved(chain: Chain, dtypes: tuple[torch.dtype, ...]) -> tuple[int, int]:
    """Returns the bytes read and written per parameter, for dtypes of weight, gradient and buffers."""
    sizes = _sizes(chain, dtypes)
    state = [buffer.name for stage in chain.stages for buffer in stage.buffers]
    read = [*(name for name in state if name not in WRITE_ONLY), *chain.storage.sources]
    read += ["gradient"] * any(stage.kernel not in GRADIENT_FREE for stage in chain.stages)
    written = [*(name for name in state if name not in READ_ONLY), *chain.storage.targets]
    return sum(sizes[name] for name in read), sum(sizes[name] for name in written)


def momentum_read(chain: Chain, dtypes: tuple[torch.dtype, ...]) -> int:
    """Returns the bytes per parameter that the norm of the momentum reads: gradient and old momentum.

    It reads the weight as well where an L2 penalty is added to the gradient, as in torch's SGD.
    """
    names = ["gradient", next(stage.buffers[0].name for stage in chain.stages if stage.momentum)]
    if any(stage.kernel == "regularizers.l2_decay" for stage in chain.stages):
        names += chain.storage.sources
    sizes = _sizes(chain, dtypes)
    return sum(sizes[name] for name in names)


def _sizes(chain: Chain, dtypes: tuple[torch.dtype, ...]) -> dict[str, int]:
    names = ("parameter", "gradient", *(buffer.name for buffer in chain.buffers))
    return {name: dtype.itemsize for name, dtype in zip(names, dtypes, strict=True)}


def optimizer(
    name: str, params: Iterable[Any], max_norm: float = MAX_NORM, rho: float = RHO, **options: Any
) -> Any:
    """Returns the fastreg optimizer that runs a chain; one with "dp" can be stepped by `DPOptimizer` only.

    Args:
        name: Such as "clip+noise+AdamW+EMA".
        params: The parameters.
        max_norm: Largest norm, if the chain clips.
        rho: Size of the perturbation, if the chain has one.
        options: Options of the optimizer, such as `lr`.
    """
    make, settings = OPTIMIZERS[rule(name)]
    parts = name.split("+")
    chosen = [component(max_norm, rho) for key, component in COMPONENTS.items() if key in parts]
    settings = {"regularizers": chosen, **settings, **options}
    if {"SAM", "ASAM"} & set(parts):
        return fastreg.SAM(params, make, rho, "ASAM" in parts, **settings)
    return make(params, **settings)


def whole_step(made: Any) -> Callable[[], Any]:
    """Returns a function that steps on the present gradients; for SAM of any library, by both steps."""
    if not hasattr(made, "first_step"):
        return made.step

    def both() -> None:
        made.first_step()
        made.second_step()

    return both


def shipped() -> Iterator[Shipped]:
    """Yields every chain at every combination of dtypes, then the passes outside the step."""
    for name, budgets in BUDGETS.items():
        for storage, budget in zip(STORAGES, budgets, strict=True):
            yield at(name, storage, budget)
    for name, budgets in PASSES.items():
        for storage, budget in zip(("fp32", "bf16"), budgets, strict=True):
            yield pass_at(name, storage, budget)


def at(name: str, storage: str, budget: float = float("inf"), **options: Any) -> Shipped:
    """Returns the chain of a name at one of the `STORAGES`, with options of the optimizer."""
    dtype, bf16, state_dtype = STORAGES[storage]
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
    made = optimizer(name, [parameter], bf16=bf16, state_dtype=state_dtype, **options)
    base = getattr(made, "base_optimizer", made)
    group = made.param_groups[0]
    always = (True,) * len(base._overriding["due"])
    chain = base.chain(group, dtype, (made is not base, *always))
    summed = torch.float32 if "dp" in name.split("+") else dtype  # sums of clipped gradients
    return Shipped(name, storage, chain, (dtype, summed, *_state_dtypes(base, chain, parameter)), budget)


def pass_at(name: str, storage: str, budget: float = float("inf")) -> Shipped:
    """Returns one of the `PASSES` over weights of the dtype of a storage."""
    dtype = STORAGES[storage][0]
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
    group = 0
    if name == "AveragedModel":  # over the averages: weights take the place of gradients
        rounded = parameter.detach().clone() if dtype == torch.bfloat16 else None
        average = parameter.detach().float()
        made: MultiTensorOptimizer = UpdateAverages([average], [rounded])
        parameter, group = average, int(rounded is not None)
    elif name == "Lookahead sync":
        made = fastreg.Lookahead(torch.optim.SGD([parameter]))._sync  # type: ignore[assignment]
    elif name == "weight noise":
        made = fastreg.WeightNoise([parameter], STD)._pass  # type: ignore[assignment]
    elif name == "SAM restore":
        made = Restore()
        made.param_groups = [{"params": [parameter]}]
    else:
        made = fastreg.SAM([parameter], torch.optim.SGD, adaptive=name == "ASAM climb")._pass
    chain = made.chain(made.param_groups[group], parameter.dtype)
    return Shipped(
        name, storage, chain, (parameter.dtype, dtype, *_state_dtypes(made, chain, parameter)), budget
    )


def _state_dtypes(made: MultiTensorOptimizer, chain: Chain, parameter: Any) -> list[torch.dtype]:
    """Returns the dtypes of a chain's buffers; as in a step, they follow from the parameter's whole chain."""
    whole, state = made.chain(made.param_groups[-1], parameter.dtype), made.state[parameter]
    return [
        state[b.name].dtype if b.name in state else made.buffer_dtype(whole, b, parameter)
        for b in chain.buffers
    ]
