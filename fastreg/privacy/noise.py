"""Gaussian noise for differential privacy: its key, and the component that adds it to gradients.

Each normal is a function of (key, step, parameter, global element index): the same for all shardings and all
ways to split a batch, without a tensor of noise. Two updates with the same four values would reveal the
difference of their gradients, so a key is never used twice: it comes from the operating system, is not saved,
not copied and not derived from any seed of torch, and the count of steps never decreases.
"""

import contextlib
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..common.random import Purpose, key
from ..common.validation import check_flag, check_int
from ..engine.component import Component, Phase
from ..engine.multi_tensor_optimizer import MultiTensorOptimizer
from ..engine.plan import Operands, Plan
from ..engine.stage import Stage
from ..reference import regularizers as reference

STEPS = 2**32
"""Number of steps after which noise would repeat."""


class NoiseKey:
    """The key of privacy noise and a count of the steps that used it.

    Args:
        seed: Derives the key, for repeatable runs; anyone who knows it can remove the noise. By default the
            key comes from `os.urandom`.
        reproducible: Whether key and count are saved, copied and loaded. If not, a checkpoint or a copy
            continues with a new key.

    Raises:
        TypeError: If `reproducible` is neither true nor false.
        ValueError: If the seed is no whole number, or has more than 64 bits.
    """

    def __init__(self, seed: int | None = None, reproducible: bool = False) -> None:
        self.reproducible = check_flag("reproducible", reproducible)
        if seed is None:
            self.renew()
            return
        seed = check_int("noise_seed", seed, -(2**63))
        warnings.warn(
            f"noise_seed={seed!r} makes privacy noise predictable: whoever knows the seed can take it off "
            "again; it is for tests and repeated experiments, leave it out for private data",
            UserWarning,
            stacklevel=3,
        )
        self.key, self.count = key(seed, Purpose.PRIVACY), 0

    def renew(self) -> None:
        """Draws a new key and resets the count."""
        self.key = int.from_bytes(os.urandom(8), "little", signed=True)
        self.count = 0

    def advance(self) -> int:
        """Returns the number of a step whose noise is drawn now; each number is returned once.

        Raises:
            OverflowError: After 2³² steps.
        """
        if self.count >= STEPS:
            raise OverflowError(f"noise is used up after {STEPS} steps: call renew() for a new key")
        self.count += 1
        return self.count - 1

    def state(self) -> dict[str, int]:
        """Returns key and count for a checkpoint, or nothing unless `reproducible`."""
        return {"key": self.key, "count": self.count} if self.reproducible else {}

    def load(self, state: dict[str, int]) -> None:
        """Restores a saved key if `reproducible`, otherwise draws a new one."""
        self.renew()
        if self.reproducible and "key" in state:
            self.key, self.count = int(state["key"]), int(state["count"])

    def __getstate__(self) -> dict[str, Any]:
        return {"reproducible": self.reproducible, **self.state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.reproducible = state["reproducible"]
        self.load(state)


class PrivateNoise(Component):
    """Adds noise to a sum of clipped gradients and scales it: u ← (u + std · N(0, 1)) · share.

    It precedes all other components, which then post-process a private quantity. It does not clip, so a step
    must be authorized by `DPOptimizer`.

    Args:
        noise: Key of the noise and count of steps.

    Reference:
        Abadi et al. 2016, "Deep learning with differential privacy".
    """

    phase = Phase.PRIVACY
    reads_gradients = False
    _stage = Stage(
        "regularizers.private_noise", reference.private_noise, rng_keys=("key",), step_scalars=4, exact=True
    )

    def __init__(self, noise: NoiseKey) -> None:
        self.noise = noise
        self._authorized: tuple[float, float, int] | None = None
        self._pass_once = False

    def pass_once(self) -> None:
        """Lets the next step through without noise, because its gradients have it already."""
        self._pass_once = True

    @contextlib.contextmanager
    def authorize_step(self, std: float, share: float, step: int) -> Iterator[None]:
        """Allows steps within the block.

        Args:
            std: Standard deviation σ · C of the noise, in units of the gradient.
            share: Factor on the noised sum: 1 / expected batch size for a mean.
            step: The number of the step, from `NoiseKey.advance`.
        """
        self._authorized = std, share, step
        try:
            yield
        finally:
            self._authorized = None

    def prepare(self, plan: Plan | None = None) -> None:
        """Refuses a step that is not authorized.

        Raises:
            RuntimeError: Outside of `authorize_step`, unless `pass_once` was called.
        """
        pass_once, self._pass_once = self._pass_once, False
        if self._authorized is None and not pass_once:
            raise RuntimeError(
                "step() of an optimizer inside DPOptimizer would use gradients that are not private: call "
                "step() of the DPOptimizer, or its detach() to have the optimizer back"
            )

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """Returns standard deviation, share, and the count in halves that float32 holds exactly."""
        std, share, count = self._authorized or (0.0, 1.0, 0)
        return std, share, float(count & 0xFFFF), float(count >> 16)

    def rng_keys(self, seed: int) -> tuple[int, ...]:
        """Returns the key, which does not depend on the optimizer's seed."""
        return (self.noise.key,)


class _WriteGradient(Component):
    """Writes the processed gradient in place."""

    phase = Phase.DESCEND
    _stage = Stage("regularizers.replaced", reference.replaced)


class InPlaceNoise(MultiTensorOptimizer):
    """Adds privacy noise to sums in place, for optimizers that are not fastreg's: 8 bytes a parameter."""

    def __init__(self, component: PrivateNoise) -> None:
        self._set_components((component, _WriteGradient()), seed=0)
        self.__setstate__({"defaults": {}, "state": defaultdict(dict), "param_groups": [{"params": []}]})

    def add_noise(self, sums: list[Tensor], streams: list[int]) -> None:
        """Adds noise to the sums of parameters in place; `streams` are their indices in the optimizer."""
        try:
            self._run_step(Operands(sums, list(sums), [0] * len(sums), streams))
        finally:  # the sums of the next step are other tensors
            self.state.clear()
            self.reset_cache()
