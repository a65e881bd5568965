"""Gaussian noise for differential privacy: where it comes from, and the stage that adds it.

Every normal is a function of (key, step, parameter, global element index): the same for every sharding and
every way to split a batch, with no noise tensor anywhere.  Two updates under the same four show the
difference of their gradients without any noise, so that a key is never used twice: it comes from the
operating system, is not saved, not copied and not derived from any seed of torch, and the count of steps
never goes back.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..common.random import Purpose, key
from ..engine.component import Component, Phase, Work
from ..engine.multi_tensor_optimizer import MultiTensorOptimizer, Operands
from ..engine.stage import Stage
from ..reference import regularizers as reference

STEPS = 2**32
"""How many steps the count can tell apart."""


class Noise:
    """A key and a count of steps.

    Args:
        seed: Derives the key, for runs that are to be repeated; whoever knows it can take the noise off
            again.  By default the key comes from `os.urandom`.
        reproducible: Whether key and count are saved, copied and loaded.  If not, whatever continues from a
            checkpoint or a copy has a key of its own.

    Raises:
        ValueError: If the seed has more than 64 bits.
    """

    def __init__(self, seed: int | None = None, reproducible: bool = False) -> None:
        self.reproducible = bool(reproducible)
        if seed is None:
            self.renew()
            return
        warnings.warn(
            f"noise_seed={seed!r} makes privacy noise predictable: whoever knows the seed can take it off "
            "again; it is for tests and repeated experiments, leave it out for private data",
            UserWarning,
            stacklevel=3,
        )
        self.key, self.count = key(seed, Purpose.PRIVACY), 0

    def renew(self) -> None:
        """A key that has never been used."""
        self.key = int.from_bytes(os.urandom(8), "little", signed=True)
        self.count = 0

    def advance(self) -> int:
        """The step whose noise is drawn now; no other is given the same, whether it succeeds or not.

        Raises:
            OverflowError: After 2³² steps.
        """
        if self.count >= STEPS:
            raise OverflowError(f"noise is used up after {STEPS} steps: call renew() for a new key")
        self.count += 1
        return self.count - 1

    def state(self) -> dict[str, int]:
        """What is saved; nothing unless `reproducible`."""
        return {"key": self.key, "count": self.count} if self.reproducible else {}

    def load(self, state: dict[str, int]) -> None:
        """Go on from what was saved, or with a new key where there is nothing or that is not wanted."""
        self.renew()
        if self.reproducible and state:
            self.key, self.count = int(state["key"]), int(state["count"])

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep."""
        return {"reproducible": self.reproducible, **self.state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A key of its own, unless that was saved."""
        self.reproducible = state["reproducible"]
        self.load({name: state[name] for name in ("key", "count") if name in state})


class PrivateNoise(Component):
    """Makes a sum of clipped gradients private, and divides it: u ← (u + std · N(0, 1)) · share.

    It stands before everything else that is done to a gradient, all of which is then post-processing of a
    private quantity.  It does not clip, and so is no use without `DPOptimizer`, which arms it for a step.

    Args:
        noise: Key and count.

    Reference:
        Abadi et al. 2016, "Deep learning with differential privacy".
    """

    phase = Phase.PRIVACY
    _stage = Stage(
        "regularizers.private_noise", reference.private_noise, rng_keys=("key",), step_scalars=4, exact=True
    )

    def __init__(self, noise: Noise) -> None:
        self.noise = noise
        self._armed: tuple[float, float, int] | None = None
        self._passes = False

    def pass_once(self) -> None:
        """Let the next step be taken as it is: its gradients have their noise."""
        self._passes = True

    @contextlib.contextmanager
    def armed(self, std: float, share: float, step: int) -> Iterator[None]:
        """Within the block, steps may be taken.

        Args:
            std: Standard deviation σ · C of the noise, in units of the gradient.
            share: What the sum is multiplied by afterwards: 1 / expected batch size for a mean.
            step: Which step's noise is drawn.
        """
        self._armed = std, share, step
        try:
            yield
        finally:
            self._armed = None

    def prepare(self, work: Work) -> None:
        """Refuse a step that nobody has clipped for."""
        self.check()

    def check(self) -> None:
        """Refuse a step that nobody has clipped for.

        Raises:
            RuntimeError: Unless armed.
        """
        passes, self._passes = self._passes, False
        if self._armed is None and not passes:
            raise RuntimeError(
                "step() of an optimizer inside DPOptimizer would use gradients that are not private: call "
                "step() of the DPOptimizer, or its detach() to have the optimizer back"
            )

    def stage(self, group: dict[str, Any]) -> Stage:
        """Always the same."""
        return self._stage

    def step_scalars(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """Standard deviation, share, and the count in halves that float32 holds exactly."""
        std, share, count = self._armed or (0.0, 1.0, 0)
        return std, share, float(count & 0xFFFF), float(count >> 16)

    def rng_keys(self, seed: int) -> tuple[int, ...]:
        """The key; the optimizer's seed has no part in it."""
        return (self.noise.key,)


class _Replaced(Component):
    """Writes the gradient where it was."""

    phase = Phase.DESCEND
    _stage = Stage("regularizers.replaced", reference.replaced)

    def stage(self, group: dict[str, Any]) -> Stage:
        """Always the same."""
        return self._stage


class Noising(MultiTensorOptimizer):
    """The pass that makes sums private in place: 8 bytes a parameter, for optimizers that are not fastreg's.

    Args:
        component: Which noise.
    """

    def __init__(self, component: PrivateNoise) -> None:
        self._set_components((component, _Replaced()), seed=0)
        self.__setstate__({"defaults": {}, "state": defaultdict(dict), "param_groups": [{"params": []}]})

    def over(self, sums: list[Tensor], streams: list[int]) -> None:
        """Add the noise and divide.

        Args:
            sums: Of each parameter.
            streams: Places of the parameters in their optimizer.
        """
        try:
            self._run_step(Operands(sums, list(sums), [0] * len(sums), streams))
        finally:  # the sums of the next step are other tensors
            self.state.clear()
            self.reset_cache()
