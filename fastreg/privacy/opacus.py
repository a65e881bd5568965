"""The place of Opacus' optimizers, taken by `DPOptimizer`: `PrivacyEngine` gives it instead of its own.

Importing this module imports Opacus.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import opacus  # type: ignore[import-untyped]
import torch
from opacus.optimizers import DPOptimizer as Stock  # type: ignore[import-untyped]
from torch import Tensor

from . import optimizer as own
from .noise import Noise
from .sources import Ghost, PerSample


class DPOptimizer(own.DPOptimizer, Stock):
    """`fastreg.DPOptimizer` with the constructor and the interface of `opacus.optimizers.DPOptimizer`.

    The same numbers up to rounding, the same accountant's history; the noise is fastreg's.  What differs:
    samples whose gradient is not finite count for nothing, hooks and schedulers of torch work, 16-bit
    gradients are summed in float32, and around a fastreg optimizer `p.grad` is `None` after a step unless
    `materialize_grad=True`.  With several processes sums are added up before the noise.

    Args:
        optimizer: What steps.
        noise_multiplier: σ.
        max_grad_norm: C; a list with one for each trainable parameter for `clipping="per_layer"`.
        expected_batch_size: Of each process, as Opacus has it.
        loss_reduction: `"mean"` or `"sum"`.
        generator: Its seed is the seed of the noise; by default the key comes from the operating system.
        secure_mode: Refused.
        clipping: `"flat"` or `"per_layer"`.
        grad_sample_mode: `"ghost"` where `p.grad` holds what Opacus' ghost clipping has summed.
        materialize_grad: Leave the noised gradient in `p.grad`.
        reproducible: Save key and count of the noise in checkpoints.
        kwargs: Ignored, as Opacus does.

    Raises:
        ValueError: For values out of range, and for what `fastreg.DPOptimizer` refuses.
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
        own.check_clipping(clipping)
        ghost = grad_sample_mode == "ghost"
        if ghost and clipping != "flat":
            raise ValueError(f"ghost clipping must be 'flat', got {clipping=}")
        source = Ghost(max_grad_norm) if ghost else PerSample(max_grad_norm, clipping)  # type: ignore[arg-type]
        noise = Noise(None if generator is None else generator.initial_seed(), reproducible)
        self._begin(
            optimizer, source, noise_multiplier, expected_batch_size, loss_reduction, noise, materialize_grad,
            None,
        )  # fmt: skip
        self.generator, self.secure_mode = generator, secure_mode
        if isinstance(source, PerSample):
            source.bounds(len(self.params))  # refuses another number of them

    @property
    def max_grad_norm(self) -> float:
        """C, or √(Σ C²) where each parameter has its own, which `max_grad_norms` holds."""
        return self.sensitivity

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        given = self._source.max_grad_norm
        if isinstance(given, Sequence):
            scale = float(value) / self.sensitivity
            self._source.max_grad_norm = [scale * bound for bound in given]
        else:
            self._source.max_grad_norm = float(value)

    @property
    def max_grad_norms(self) -> list[float]:
        """C of each trainable parameter, with per-layer clipping."""
        return self._source.bounds(len(self.params))  # type: ignore[attr-defined]

    @property
    def grad_samples(self) -> list[Tensor]:
        """What is held per sample of each parameter; those of several batches behind each other."""
        return [self._get_flat_grad_sample(p) for p in self.params]

    def _share(self) -> float:
        return super()._share() / (self._mechanism.world if self.loss_reduction == "mean" else 1)

    def clip_and_accumulate(self) -> None:
        """Clip and sum, into `p.summed_grad`."""
        with torch.no_grad():
            self._source.keep(self._trainable())

    def pre_step(self, closure: Any = None) -> bool:
        """Everything of a step but the base optimizer's: the noised gradient is in `p.grad`.

        Args:
            closure: Taken as in Opacus, without effect.

        Returns:
            Whether the base optimizer is to step; not if the step is skipped.
        """
        self._refuse(None)
        if self._check_skip_next_step():
            self.accumulate()
            return False
        with self._release(materialize=True):
            pass
        self._mechanism.component.pass_once()
        return True

    def add_noise(self) -> None:
        """Refused: noise, scale and step are one.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "noise is added within step(); pre_step() leaves the noised gradient in p.grad"
        )

    scale_grad = add_noise

    def __repr__(self) -> str:
        """That of the base optimizer."""
        return repr(self.base_optimizer)


class PrivacyEngine(opacus.PrivacyEngine):
    """`opacus.PrivacyEngine` whose `make_private` gives fastreg's `DPOptimizer`.

    Models, loaders, accountants, checkpoints and schedulers are those of Opacus.  `make_private` also takes
    `materialize_grad` and `reproducible`.
    """

    def _prepare_optimizer(
        self, *, optimizer: torch.optim.Optimizer, noise_multiplier: float,
        max_grad_norm: float | list[float], expected_batch_size: float, loss_reduction: str = "mean",
        distributed: bool = False, clipping: str = "flat", noise_generator: Any = None,
        grad_sample_mode: str = "hooks", **kwargs: Any,
    ) -> DPOptimizer:  # fmt: skip
        if isinstance(optimizer, own.DPOptimizer):
            optimizer = optimizer.detach()
        elif isinstance(optimizer, Stock):
            optimizer = optimizer.original_optimizer
        if clipping not in ("flat", "per_layer") or grad_sample_mode == "ghost_fsdp":
            raise ValueError(
                f"{clipping=} with {grad_sample_mode=} is not supported by fastreg: use opacus.PrivacyEngine"
            )
        return DPOptimizer(
            optimizer, noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size, loss_reduction=loss_reduction,
            generator=noise_generator, secure_mode=self.secure_mode, clipping=clipping,
            grad_sample_mode=grad_sample_mode, **kwargs,
        )  # fmt: skip
