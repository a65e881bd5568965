"""Replaces Opacus' optimizer by `DPOptimizer`: a `PrivacyEngine` that creates it instead.

Importing this module imports Opacus.
"""

from collections.abc import Sequence
from typing import Any

import opacus  # type: ignore[import-untyped]
import torch
from opacus.optimizers import DPOptimizer as StockOptimizer  # type: ignore[import-untyped]
from torch import Tensor

from ..common.validation import check_choice
from . import optimizer as base
from .bounds import CLIPPING
from .grad_sources import GradSampleSource, OpacusGhostSource
from .noise import NoiseKey
from .private_step import PrivateStep


class OpacusDPOptimizer(base.DPOptimizer, StockOptimizer):
    """`fastreg.DPOptimizer` with the constructor and the interface of `opacus.optimizers.DPOptimizer`.

    The same numbers up to rounding and the same accountant's history, but the noise is fastreg's. Other
    differences: samples whose gradient is not finite are excluded, hooks and schedulers of torch work, 16-bit
    gradients are summed in float32, and around a fastreg optimizer `p.grad` is `None` after a step unless
    `materialize_grad=True`. With several processes sums are added up before the noise.

    Args:
        optimizer: The optimizer that steps.
        max_grad_norm: C; a list with one for each trainable parameter for `clipping="per_layer"`.
        expected_batch_size: Expected number of samples of each process, as in Opacus.
        generator: Its seed is the seed of the noise; by default the key comes from the operating system.
        secure_mode: Refused.
        grad_sample_mode: `"ghost"` if Opacus' ghost clipping writes sums to `p.grad`.
        kwargs: Ignored, as in Opacus. All other arguments are those of `fastreg.DPOptimizer`.

    Raises:
        ValueError: For values out of range, and optimizers that `fastreg.DPOptimizer` refuses.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, noise_multiplier: float,
        max_grad_norm: float | Sequence[float], expected_batch_size: float | None,
        loss_reduction: str = "mean", generator: torch.Generator | None = None, secure_mode: bool = False,
        clipping: str = "flat", grad_sample_mode: str = "hooks", materialize_grad: bool = False,
        reproducible: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        if secure_mode:
            raise ValueError(
                "secure_mode=True is not supported: the noise is drawn by a generator that is not "
                "cryptographic; use opacus.PrivacyEngine(secure_mode=True)"
            )
        check_choice("clipping", clipping, CLIPPING)
        ghost = grad_sample_mode == "ghost"
        if ghost and clipping != "flat":
            raise ValueError(f"ghost clipping must be 'flat', got {clipping=}")
        source = OpacusGhostSource(max_grad_norm) if ghost else GradSampleSource(max_grad_norm, clipping)
        PrivateStep.__init__(
            self, optimizer, source,
            NoiseKey(None if generator is None else generator.initial_seed(), reproducible),
            noise_multiplier=noise_multiplier, expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction, materialize_grad=materialize_grad,
        )  # fmt: skip
        self.generator, self.secure_mode = generator, secure_mode
        if isinstance(source, GradSampleSource):
            source.bounds(len(self.params))  # refuses another number of bounds

    @property
    def max_grad_norm(self) -> float:
        """The bound C, or √(Σ C²) if each parameter has its own, see `max_grad_norms`."""
        return self.sensitivity

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        bounds = self._source.max_grad_norm
        if isinstance(bounds, Sequence):
            scale = float(value) / self.sensitivity
            self._source.max_grad_norm = [scale * bound for bound in bounds]
        else:
            self._source.max_grad_norm = float(value)

    @property
    def max_grad_norms(self) -> list[float]:
        """The bound of each trainable parameter, for per-layer clipping."""
        return self._source.bounds(len(self.params))  # type: ignore[union-attr]

    @property
    def grad_samples(self) -> list[Tensor]:
        """The per-sample gradients of each parameter; several batches are concatenated."""
        return [self._get_flat_grad_sample(p) for p in self.params]

    def _share(self) -> float:
        return super()._share() / (self._mechanism.world if self.loss_reduction == "mean" else 1)

    def clip_and_accumulate(self) -> None:
        """Clips gradients of samples and adds them to `p.summed_grad`."""
        with torch.no_grad():
            self._source.accumulate(self._trainable())

    def pre_step(self, closure: Any = None) -> bool:
        """Takes a step without the base optimizer's part; the noised gradient is then in `p.grad`.

        Args:
            closure: Accepted as in Opacus, without effect.

        Returns:
            Whether the base optimizer should step; not if the step is skipped.
        """
        self._check_step(None)
        if self._check_skip_next_step():
            self.accumulate()
            return False
        with self._release(materialize=True):
            pass
        self._mechanism.component.pass_once()
        return True

    def add_noise(self) -> None:
        """Refuses to add noise without accounting for a step.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "noise is added within step(); pre_step() leaves the noised gradient in p.grad"
        )

    scale_grad = add_noise

    def __repr__(self) -> str:
        """Returns the representation of the base optimizer."""
        return repr(self.base_optimizer)


DPOptimizer = OpacusDPOptimizer  # the old name, for one release


class PrivacyEngine(opacus.PrivacyEngine):
    """`opacus.PrivacyEngine` whose `make_private` returns fastreg's `DPOptimizer`.

    Models, loaders, accountants, checkpoints and schedulers are those of Opacus. `make_private` also takes
    `materialize_grad` and `reproducible`.
    """

    def _prepare_optimizer(
        self, *, optimizer: torch.optim.Optimizer, clipping: str = "flat", noise_generator: Any = None,
        grad_sample_mode: str = "hooks", **kwargs: Any,
    ) -> OpacusDPOptimizer:  # fmt: skip
        if isinstance(optimizer, base.DPOptimizer):
            optimizer = optimizer.detach()
        elif isinstance(optimizer, StockOptimizer):
            optimizer = optimizer.original_optimizer
        if clipping not in CLIPPING or grad_sample_mode == "ghost_fsdp":
            raise ValueError(
                f"{clipping=} with {grad_sample_mode=} is not supported by fastreg: use opacus.PrivacyEngine"
            )
        return OpacusDPOptimizer(
            optimizer, generator=noise_generator, secure_mode=self.secure_mode, clipping=clipping,
            grad_sample_mode=grad_sample_mode, **kwargs,
        )  # fmt: skip
