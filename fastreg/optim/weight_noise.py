"""Adds noise to weights for the length of a forward and a backward pass.

perturb  read the weight; write it with noise, and its backup: 12 bytes a parameter in float32, one launch
restore  read the backup, write the weight: 8 bytes, one launch
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.random import Purpose, key
from ..common.validation import check_flag, check_range
from ..engine import layout
from ..engine.component import Component, Phase
from ..engine.stage import Stage
from ..engine.state import BACKUP
from ..reference import ascent as reference
from .perturb import Perturb, perturbed_rounding


class _Noise(Component):
    """Adds Gaussian noise to the weight."""

    phase = Phase.RULE
    _stage = Stage("ascent.noise", reference.noise, (BACKUP,), rng_keys=("key",), step_scalars=2)

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        std = check_range("std", group["std"], 0)
        return (0.0, std) if group["relative"] else (std, 0.0)

    def rng_keys(self, seed: int) -> tuple[int, ...]:
        return (key(seed, Purpose.WEIGHT_NOISE),)


class PerturbByNoise(Perturb):
    """Adds noise to all weights, with gradients or without."""

    def __init__(self, params: Any, defaults: dict[str, Any], rounding: str, seed: int | None) -> None:
        self._set_components((_Noise(), perturbed_rounding(rounding)), seed)
        super().__init__(params, defaults)

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters of all groups."""
        return [p for group in self.param_groups for p in group["params"]]

    def perturb(self) -> None:
        """Adds noise to all weights."""
        self._run_step(self._operands(self.parameters))  # the stage reads no gradients


class WeightNoise:
    """Adds Gaussian noise to all weights while gradients are computed: w + std · N(0, 1), then restores them.

    ```python
    noise = fastreg.WeightNoise(model.parameters(), std=0.01)
    for x, y in data:
        with noise.perturbed():
            loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    ```

    The weights are restored bit for bit, also after an exception; `data_ptr()` never changes, and parameters
    without gradients take part.  All of them are perturbed in one launch.  Step the optimizer afterwards:
    a step within the block is lost.  The backups take the memory of the weights, once.

    Each perturbation has new noise, a function of the seed, the number of perturbations before, the position
    of the parameter and the element index: the same on every backend and for every sharding.

    Args:
        params: Parameters, named parameters or groups, as for any torch optimizer; groups may have a `std`
            and `relative` of their own.
        std: Standard deviation, in units of the weights or as a share of each; ≥ 0.  A key of the groups.
        relative: Whether the noise of each weight is of `std · |w|`, a relative error, which does not depend
            on the scale of the weights and leaves zeros alone.
        rounding: Of perturbed 16-bit weights, `"stochastic"` or `"nearest"`. See `SAM`.
        seed: Of the noise; by default from `torch.initial_seed()`.  Replicas of a model (DDP) may have
            different seeds, and then average over their noise.

    Raises:
        TypeError: If a parameter is not of a floating dtype.
        ValueError: For values out of range.

    Reference:
        Graves 2011, "Practical variational inference for neural networks"; An 1996, "The effects of adding
        noise during backpropagation training on a generalization performance".
    """

    def __init__(
        self, params: Any, std: float, relative: bool = False, rounding: str = "stochastic", *,
        seed: int | None = None,
    ) -> None:  # fmt: skip
        defaults = {"std": check_range("std", std, 0), "relative": check_flag("relative", relative)}
        self._pass = PerturbByNoise(params, defaults, rounding, seed)
        for group in self.param_groups:
            check_range("std", group["std"], 0)
            check_flag("relative", group["relative"])
        for p in self._pass.parameters:
            if not (p.is_floating_point() or p.is_complex()):
                raise TypeError(f"weights must be of a floating dtype, got {p.dtype}")
        self._perturbed = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups, whose `std` may be changed at any time."""
        return self._pass.param_groups

    @property
    def std(self) -> float:
        """The standard deviation of the first group; setting it sets that of all groups."""
        return self.param_groups[0]["std"]

    @std.setter
    def std(self, value: float) -> None:
        value = check_range("std", value, 0)
        for group in self.param_groups:
            group["std"] = value

    @property
    def seed(self) -> int:
        """The seed of the noise, which checkpoints hold."""
        return self._pass.seed

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights have noise now."""
        return self._perturbed

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """Adds noise to the weights for the length of a block.

        Raises:
            RuntimeError: If they are perturbed already.
        """
        self.perturb()
        try:
            yield
        finally:
            self.restore()

    @torch.no_grad()
    def perturb(self) -> None:
        """Adds noise to the weights until `restore`.

        Raises:
            RuntimeError: If they are perturbed already.
        """
        if self._perturbed:
            raise RuntimeError("the weights are perturbed already: call restore() first")
        self._pass.perturb()
        self._perturbed = True
        layout.reshard(self._pass.parameters)

    @torch.no_grad()
    def restore(self) -> None:
        """Restores the weights as they were, if they are perturbed."""
        if self._perturbed:
            self._pass.restore(self._pass.parameters)
            self._perturbed = False
            layout.reshard(self._pass.parameters)  # FSDP2 may still use the noisy ones that it has gathered

    def state_dict(self) -> dict[str, int]:
        """Returns seed and count, from which a resumed run goes on with the same noise.

        Raises:
            RuntimeError: While the weights are perturbed: a checkpoint of them would hold the noise.
        """
        self._refuse_perturbed("state_dict")
        counts = (state["step"] for state in self._pass.state.values())
        return {"seed": self.seed, "step": int(next(counts, 0))}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads seed and count from a `state_dict`.

        Raises:
            RuntimeError: While the weights are perturbed.
        """
        self._refuse_perturbed("load_state_dict")
        key(state_dict["seed"], Purpose.WEIGHT_NOISE)  # refuses a seed that does not fit
        self._pass._seed = int(state_dict["seed"])
        for p in self._pass.parameters:
            self._pass.state[p]["step"] = torch.tensor(float(state_dict["step"]), device="cpu")

    def _refuse_perturbed(self, name: str) -> None:
        if self._perturbed:
            raise RuntimeError(f"{name}() while the weights are perturbed: call restore() first")

    def __repr__(self) -> str:
        groups = [(group["std"], group["relative"]) for group in self.param_groups]
        return f"{type(self).__name__}((std, relative)={groups}, seed={self.seed})"
