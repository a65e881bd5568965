"""Trains with DP-SGD around any optimizer (`DPOptimizer`), its noise fused into fastreg's optimizers.

loss.backward()   sums of clipped per-sample gradients              grad_sources.py
step()            accounting, noise, and a step of the optimizer    private_step.py
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..common.validation import check_choice, check_range
from ..optim import AdamW
from .accounting import accountant_of
from .bookkeeping import BookKeeping
from .bounds import CLIPPING
from .grad_sources import BookKeepingSource, GradSampleSource
from .noise import NoiseKey
from .private_step import PrivateStep


class DPOptimizer(PrivateStep):
    """Trains by DP-SGD: clips the gradient of each sample, adds Gaussian noise to their sum, steps.

    ```python
    optimizer = fastreg.DPOptimizer(
        fastreg.AdamW(model.parameters(), lr=1e-3), model=model, noise_multiplier=1.0, max_grad_norm=1.0,
        expected_batch_size=256, accountant="rdp", sample_rate=256 / len(data),
    )
    for batch in fastreg.privacy.poisson_loader(data, sample_rate=256 / len(data)):
        if batch is not None:  # an empty batch is a step as well
            loss(model(batch.x), batch.y).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(optimizer.epsilon(delta=1e-5))
    ```

    This implements clipping, Gaussian noise and update of DP-SGD. With Poisson-sampled batches and an
    accountant that is told the same noise multiplier, sampling rate and number of steps, the mechanism is
    that of the standard analysis in real arithmetic. It computes in floating point, with a counter-based
    generator that is not cryptographic and is seeded by the operating system: like the default paths of
    Opacus and JAX Privacy it does not defend against attacks on floating-point arithmetic or against the
    prediction of random numbers. It has not been audited by others. Norms, losses and counts of samples are
    not private.

    Around a fastreg optimizer the noise is drawn in registers and moves no extra byte. Regularizers of that
    optimizer (`ClipNorm`, `GradientNoise`) and `grad_norm` see the noised gradient. Around any other
    optimizer, a separate pass writes the noised gradient to `p.grad`. After the step of a fastreg optimizer
    `p.grad` is `None`, as the sum in it is not private; `materialize_grad=True` leaves the noised gradient.

    With `model`, samples are clipped by `BookKeeping`. Backward passes between two steps add up, so a sample
    may be in one of them only; a second one from the same input tensor, as in adversarial training (`FGM`),
    is refused. If one backward pass goes through several forward passes, as in R-Drop, these must be of the
    same samples in the same order. Without `model`, parameters must have `p.grad_sample` from Opacus'
    `GradSampleModule`. `accumulate()` and `signal_skip_step()` (for Opacus' `BatchMemoryManager`) split a
    batch. Samples whose gradient is not finite are excluded. A step without any backward pass, for an empty
    batch, adds noise and is accounted for like any other.

    Resuming: a checkpoint holds the optimizer's state and the accountant's history, not the noise. A resumed
    run draws from a new key, so that no noise is used twice. `reproducible=True` saves key and count of
    steps; restoring such a checkpoint twice and showing both results reveals the difference of gradients
    without noise.

    With several processes (`torch.distributed`) each works on its own part of a batch: sums are added up over
    the group, and the noise is added once. DTensors must hold the sum already.

    Args:
        optimizer_or_params: An optimizer, or parameters for `optimizer`.
        model: The model whose samples are clipped.
        noise_multiplier: σ, the standard deviation of the noise as a multiple of the sensitivity; ≥ 0, where
            0 is not private. It may be changed between steps, like `max_grad_norm` and learning rates.
        max_grad_norm: C, the norm to which the gradient of each sample is clipped; > 0. For `"per_layer"`
            a bound for each trainable parameter, or one number, of which each of n parameters gets C / √n.
        expected_batch_size: Divides sums if the loss is a mean: the expected number of samples over all
            processes, which is public, not the actual one.
        loss_reduction: Whether the loss is a `"mean"` over samples or their `"sum"`.
        clipping: `"flat"`, over all parameters together, or `"per_layer"`, each parameter tensor by itself
            with noise for a sensitivity of √(Σ C²).
        optimizer: Constructor of the optimizer, if parameters are given.
        accountant: Counts the steps: `"rdp"` or `"prv"` of Opacus, or an accountant with a method `step`.
        sample_rate: The probability with which a sample is in a batch, for the accountant.
        noise_seed: Makes the noise predictable, for tests; by default its key comes from `os.urandom`.
        reproducible: Whether checkpoints hold key and count of the noise.
        materialize_grad: Whether to write the noised gradient to `p.grad` and leave it there: 8 bytes a
            parameter more around a fastreg optimizer.
        batch_dim: The batch dimension of the inputs of all layers, 0 or 1.
        process_group: The processes that share a batch; all of them by default.
        kwargs: Arguments of `optimizer`, such as `lr`.

    Raises:
        TypeError: For an argument that is neither an optimizer nor parameters.
        ValueError: For values out of range, for optimizers whose use of gradients is not post-processing of
            the noised sum (SAM, AdaptiveClip), and for trainable parameters that are not clipped.

    Reference:
        Abadi et al. 2016, "Deep learning with differential privacy".
    """

    def __init__(
        self, optimizer_or_params: Any, *, model: nn.Module | None = None, noise_multiplier: float = 1.0,
        max_grad_norm: float | Sequence[float] | Mapping[str, float] = 1.0,
        expected_batch_size: float | None = None, loss_reduction: str = "mean", clipping: str = "flat",
        optimizer: Callable[..., torch.optim.Optimizer] = AdamW, accountant: Any = None,
        sample_rate: float | None = None, noise_seed: int | None = None, reproducible: bool = False,
        materialize_grad: bool = False, batch_dim: int = 0, process_group: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if not isinstance(optimizer_or_params, torch.optim.Optimizer):
            optimizer_or_params = optimizer(optimizer_or_params, **kwargs)
        elif kwargs:
            raise TypeError(f"{next(iter(kwargs))!r} is for the optimizer, which has been made already")
        check_choice("clipping", clipping, CLIPPING)
        bounds: Any = max_grad_norm
        source = GradSampleSource(bounds, clipping) if model is None else BookKeepingSource(
            model, max_grad_norm=bounds, clipping=clipping,  # type: ignore[arg-type]
            loss_reduction=loss_reduction, batch_dim=batch_dim, attach=False,  # type: ignore[arg-type]
        )  # fmt: skip
        super().__init__(
            optimizer_or_params, source, NoiseKey(noise_seed, reproducible),
            noise_multiplier=noise_multiplier, expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction, materialize_grad=materialize_grad, process_group=process_group,
        )  # fmt: skip
        try:
            if sample_rate is not None:
                self.sample_rate = check_range("sample_rate", sample_rate, 0, 1, above=True)
            if accountant is not None:
                if sample_rate is None:
                    raise ValueError("an accountant needs a sample_rate in (0, 1], got sample_rate=None")
                self.accountant = accountant_of(accountant)
            if isinstance(source, GradSampleSource):
                source.bounds(len(self.params))  # refuses bounds that are out of range, or too many
            elif model is not None:
                self._check_parameters(model)
                source.attach()
                self._noise_scale()
        except BaseException:
            self.detach()
            raise

    def _check_parameters(self, model: nn.Module) -> None:
        """Refuses parameters that only one of model and optimizer has."""
        self._names = {p: name for name, p in model.named_parameters()}
        if foreign := [name for p, name in self._trainable().items() if p not in self._names]:
            raise ValueError(
                f"{foreign[0]} of the optimizer is not one of the model: its gradient is not clipped"
            )
        optimized = {p for group in self.param_groups for p in group["params"]}
        if spare := [name for p, name in self._names.items() if p.requires_grad and p not in optimized]:
            raise ValueError(
                f"parameter {spare[0]!r} is trainable but not in the optimizer: it would count for norms; "
                "freeze it by requires_grad_(False), or give it to the optimizer"
            )

    def detach(self) -> torch.optim.Optimizer:
        """Restores optimizer and model, and returns the optimizer."""
        if self.bookkeeping is not None:
            self.bookkeeping.detach()
        return super().detach()

    @property
    def bookkeeping(self) -> BookKeeping | None:
        """The `BookKeeping` that clips samples of the model; its norms and counts are not private."""
        return self._source if isinstance(self._source, BookKeepingSource) else None
