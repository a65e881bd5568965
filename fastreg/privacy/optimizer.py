"""DP-SGD around any optimizer, its noise fused into fastreg's.

loss.backward()   sums of clipped per-sample gradients              sources.py
step()            how the step is accounted for, before anything is released
                  (sum + σ·C·N(0, 1)) / expected batch size         noise.py: the first stage of the pass
                  then the base optimizer, on nothing else: post-processing
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.validation import check_range
from ..optim import AdamW, AdaptiveClip
from ..optim.fused_optimizer import FusedOptimizer
from ..optim.sam import SAM
from ..optim.wrapper import Wrapper, evaluated
from .accounting import Accounted, accountant_of, spent
from .bookkeeping import BookKeeping
from .mechanism import Mechanism
from .noise import Noise, PrivateNoise
from .sources import BookKept, Parameters, PerSample, Source

SAVED = "privacy"
"""The key of the groups of a state dict under which a checkpoint holds what is saved besides."""


class DPOptimizer(Wrapper):
    """DP-SGD: every sample's gradient is clipped, Gaussian noise is added to their sum, any optimizer steps.

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

    This implements clipping, Gaussian noise and update of DP-SGD; with Poisson-sampled batches and an
    accountant that is told the same noise multiplier, sampling rate and number of steps, the mechanism is
    that of the standard analysis in real arithmetic.  It computes in floating point, with a counter-based
    generator that is not cryptographic and is seeded by the operating system: like the default paths of
    Opacus and JAX Privacy it does not defend against attacks on floating-point arithmetic or against the
    prediction of random numbers.  It has not been audited by others.  Norms, losses and counts of samples are
    not private.

    Around a fastreg optimizer the noise is drawn in the registers of its pass: no byte more than the
    optimizer moves.  Whatever it does to gradients besides (`ClipNorm`, `GradientNoise`) comes behind the
    noise, `grad_norm` as well.  Around any other, one pass writes the noised gradient to `p.grad` before the
    optimizer's own.  After the step of a fastreg optimizer `p.grad` is `None`, as what it held is not
    private; `materialize_grad=True` leaves the noised gradient there.

    With `model`, samples are clipped by `BookKeeping`: backward passes between two steps add up, so that
    every sample may be in one of them only; one that starts from the same input tensor as another, as in
    adversarial training (`FGM`), is refused.  Where one backward pass goes through several forward passes,
    as in R-Drop, these must be of the same samples in the same order.
    Without, parameters must have `p.grad_sample` from Opacus' `GradSampleModule`.  `accumulate()` and
    `signal_skip_step()` (which Opacus' `BatchMemoryManager` calls) split a batch.  Samples whose gradient is
    not finite count for nothing.  A step without any backward pass, as for an empty batch, adds noise and is
    accounted for like any other.

    Resuming: a checkpoint holds the optimizer's state and the accountant's history, not the noise.  What
    continues from it draws from a new key, so that no noise is ever used twice; under `reproducible=True`
    key and count of steps are saved, and whoever restores a checkpoint twice and shows both results shows the
    difference of gradients without noise.

    With several processes (`torch.distributed`) each works on its own part of a batch: sums are added up over
    the group, noise is that of one process.  DTensors must hold the sum already.

    Args:
        optimizer_or_params: An optimizer, or parameters for `optimizer`.
        model: Whose samples are to be clipped.
        noise_multiplier: σ, the standard deviation of the noise as a multiple of the sensitivity; ≥ 0, where
            0 is not private.  It may be changed between steps, like `max_grad_norm` and learning rates.
        max_grad_norm: C, the norm to which the gradient of every sample is clipped; > 0.  For `"per_layer"`
            a bound for each trainable parameter, or one number that is shared out among them: C / √n each.
        expected_batch_size: What sums are divided by where the loss is a mean, over all processes: the
            expected number of samples, which is public, not how many there are.
        loss_reduction: Whether the loss is a `"mean"` over the samples or their `"sum"`.
        clipping: `"flat"`, over all parameters together, or `"per_layer"`, each parameter tensor by itself
            with noise for a sensitivity of √(Σ C²).
        optimizer: Makes the optimizer from parameters.
        accountant: What counts the steps: `"rdp"` or `"prv"` of Opacus, or an accountant with its `step`.
        sample_rate: The probability with which a sample is in a batch, for the accountant.
        noise_seed: Makes the noise predictable, for tests; by default its key comes from `os.urandom`.
        reproducible: Save key and count of the noise in checkpoints.
        materialize_grad: Write the noised gradient to `p.grad` and leave it there: 8 bytes a parameter more
            around a fastreg optimizer.
        batch_dim: Where the samples are in the input of every layer, 0 or 1.
        process_group: The processes that share a batch; all of them by default.
        kwargs: For `optimizer`, such as `lr`.

    Raises:
        TypeError: For what is neither an optimizer nor parameters.
        ValueError: For values out of range, for optimizers whose use of gradients is not post-processing of
            the noised sum (SAM, AdaptiveClip), and for trainable parameters that are not clipped.

    Reference:
        Abadi et al. 2016, "Deep learning with differential privacy".
    """

    _step_supports_amp_scaling = True  # so that a scaler asks, and is refused

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
        source: Source
        check_clipping(clipping)
        if model is None:
            source = PerSample(max_grad_norm, clipping)  # type: ignore[arg-type]
        else:
            source = BookKept(
                BookKeeping(
                    model, max_grad_norm=max_grad_norm, clipping=clipping,  # type: ignore[arg-type]
                    loss_reduction=loss_reduction, batch_dim=batch_dim, attach=False,  # type: ignore[arg-type]
                )
            )  # fmt: skip
        self._begin(
            optimizer_or_params, source, noise_multiplier, expected_batch_size, loss_reduction,
            Noise(noise_seed, reproducible), materialize_grad, process_group,
        )  # fmt: skip
        try:
            self._attend(model, accountant, sample_rate)
        except BaseException:
            self.detach()
            raise

    def _begin(
        self, base: torch.optim.Optimizer, source: Source, noise_multiplier: float,
        expected_batch_size: float | None, loss_reduction: str, noise: Noise, materialize_grad: bool,
        process_group: Any,
    ) -> None:  # fmt: skip
        """Everything but where gradients come from."""
        _check_base(base)
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
        if loss_reduction == "mean":
            if expected_batch_size is None:
                raise ValueError(
                    "expected_batch_size must be given where the loss is a mean: the sample rate times the "
                    "public size of the data, got None"
                )
            check_range("expected_batch_size", expected_batch_size, 0, above=True)
        super().__init__(base)
        self.loss_reduction, self.expected_batch_size = loss_reduction, expected_batch_size
        self.noise_multiplier: Any = check_range("noise_multiplier", float(noise_multiplier), 0)
        self.materialize_grad = bool(materialize_grad)
        self.step_hook: Callable[[Any], None] | None = None
        self.accountant: Any = None
        self.sample_rate: float | None = None
        self._step_skip_queue: list[bool] = []
        self._is_last_step_skipped = False
        self._names: dict[Tensor, str] = {}
        self._source = source
        self._mechanism = Mechanism(source, noise, process_group)
        self._guard: Any = None
        if self.engine is not None:
            self.engine.add_component(self._mechanism.component)
        else:
            inner: Any = base
            while isinstance(inner, Wrapper):
                inner = inner.base_optimizer
            self._guard = inner.register_step_pre_hook(lambda *_: self._mechanism.component.check())

    def _attend(self, model: nn.Module | None, accountant: Any, sample_rate: float | None) -> None:
        if accountant is not None:
            if sample_rate is None or not 0 < sample_rate <= 1:
                raise ValueError(f"an accountant needs a sample_rate in (0, 1], got {sample_rate=}")
            self.accountant, self.sample_rate = accountant_of(accountant), float(sample_rate)
        if isinstance(self._source, PerSample):
            self._source.bounds(len(self._trainable()))  # refuses what is out of range, or too many
        if model is None:
            return
        self._names = {p: name for name, p in model.named_parameters()}
        own = self._trainable()
        if foreign := [name for p, name in own.items() if p not in self._names]:
            raise ValueError(
                f"{foreign[0]} of the optimizer is not one of the model: its gradient is not clipped"
            )
        held = {p for group in self.param_groups for p in group["params"]}
        if spare := [name for p, name in self._names.items() if p.requires_grad and p not in held]:
            raise ValueError(
                f"parameter {spare[0]!r} is trainable but not in the optimizer: it would count for norms; "
                "freeze it by requires_grad_(False), or give it to the optimizer"
            )
        self._source.engine.attach()  # type: ignore[attr-defined]
        self._scale()

    def detach(self) -> torch.optim.Optimizer:
        """Give optimizer and model back as they were.

        Returns:
            The optimizer.
        """
        if isinstance(self._source, BookKept):
            self._source.engine.detach()
        if self.engine is not None:
            self.engine.remove_component(self._mechanism.component)
        if self._guard is not None:
            self._guard.remove()
        return self.base_optimizer

    # What may be read and changed between steps ---------------------------------------------------------

    @property
    def original_optimizer(self) -> torch.optim.Optimizer:
        """What is wrapped, as Opacus calls it."""
        return self.base_optimizer

    @property
    def max_grad_norm(self) -> Any:
        """C: one number, or that of each parameter."""
        return self._source.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: Any) -> None:
        self._source.max_grad_norm = value

    @property
    def clipping(self) -> str:
        """`"flat"` or `"per_layer"`."""
        return self._source.clipping

    @property
    def sensitivity(self) -> float:
        """By how much one sample changes the sum of clipped gradients at most."""
        return self._source.sensitivity

    @property
    def bookkeeping(self) -> BookKeeping | None:
        """What clips the samples of the model; its norms and counts are not private."""
        return self._source.engine if isinstance(self._source, BookKept) else None

    @property
    def params(self) -> list[Tensor]:
        """The trainable parameters."""
        return list(self._trainable())

    @property
    def accumulated_iterations(self) -> int:
        """By how much the sampling rate of the step at hand exceeds that of a batch."""
        return self._source.iterations(self._trainable())

    def _trainable(self) -> Parameters:
        found = {}
        for group in self.param_groups:
            names = group.get("param_names") or [None] * len(group["params"])
            for p, name in zip(group["params"], names, strict=True):
                if p.requires_grad:
                    found[p] = self._names.get(p) or name or f"a parameter of shape {tuple(p.shape)}"
        return found

    # Accounting -----------------------------------------------------------------------------------------

    def attach_step_hook(self, fn: Callable[[Any], None]) -> None:
        """Have a function called at every step that is taken, with the optimizer, before it is.

        Args:
            fn: Such as `accountant.get_optimizer_hook_fn(sample_rate)`.
        """
        self.step_hook = fn

    def epsilon(self, delta: float) -> Accounted:
        """What the accountant says has been spent.

        Args:
            delta: δ of (ε, δ)-differential privacy, in (0, 1).

        Raises:
            RuntimeError: Without an accountant.
        """
        if self.accountant is None:
            raise RuntimeError(
                "epsilon() needs an accountant: give DPOptimizer accountant='rdp' and sample_rate=, or use "
                "fastreg.privacy.epsilon(noise_multiplier=..., sample_rate=..., steps=..., delta=...)"
            )
        return spent(self.accountant, delta)

    def _account(self, sigma: float, sensitivity: float) -> None:
        """Tell of a step, and hold who listens to what the kernel uses."""
        if self.accountant is not None:
            rate = self.sample_rate * self.accumulated_iterations  # type: ignore[operator]
            self.accountant.step(noise_multiplier=sigma, sample_rate=rate)
        if self.step_hook is not None:
            self.step_hook(self)
        if (float(self.noise_multiplier), self.sensitivity) != (sigma, sensitivity):
            raise RuntimeError(
                f"a step hook changed the noise from {sigma=}, {sensitivity=} to "
                f"{float(self.noise_multiplier)}, {self.sensitivity} while the step was accounted for; "
                "change it between steps"
            )

    # Steps ----------------------------------------------------------------------------------------------

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Say of a coming `step()` whether it only accumulates; several are queued."""
        self._step_skip_queue.append(do_skip)

    def _check_skip_next_step(self, pop_next: bool = True) -> bool:
        if not self._step_skip_queue:
            return False
        return self._step_skip_queue.pop(0) if pop_next else self._step_skip_queue[0]

    @torch.no_grad()
    def accumulate(self) -> None:
        """Clip what there is and keep the sum for the next step, as for a part of a batch."""
        self._source.keep(self._trainable())
        self._is_last_step_skipped = True

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scaler: Any = None) -> Any:
        """Clip, account, add noise, step; or only accumulate if that was signalled.

        Args:
            closure: Makes gradients and returns the loss.
            grad_scaler: Refused.

        Returns:
            What the closure returns, `None` without one.

        Raises:
            RuntimeError: Under a `torch.amp.GradScaler`, in a CUDA graph, and for gradients that are not
                clipped.
            ValueError: For parameters without gradients of single samples.
        """
        self._refuse(grad_scaler)
        loss = None if closure is None else evaluated(closure)
        if self._check_skip_next_step():
            self.accumulate()
        else:
            with self._release() as gradients:
                base: Any = self.base_optimizer
                base.step() if gradients is None else base.step(gradients=gradients)
        self._opt_called = True  # what schedulers look for, to warn of steps that are taken too late
        return loss

    def _refuse(self, grad_scaler: Any) -> None:
        if grad_scaler is not None:
            raise RuntimeError(
                "a torch.amp.GradScaler would have scaled gradients clipped to max_grad_norm: leave it out "
                "and use autocast with bfloat16, which needs none"
            )
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph would add the same noise at every replay: step() cannot be captured"
            )
        self._mechanism.check_forgotten()

    @contextlib.contextmanager
    def _release(self, materialize: bool = False) -> Iterator[dict[Tensor, Tensor] | None]:
        """Everything of a step but the base optimizer's, which is to be taken within the block.

        Args:
            materialize: Write the noised gradients to `p.grad` in any case.

        Yields:
            The gradients to step by, to which the step itself adds the noise; `None`: those in `p.grad`.
        """
        parameters, mechanism, engine = self._trainable(), self._mechanism, self.engine
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not p.requires_grad:
                    raise RuntimeError(
                        f"parameter {self._names.get(p, '')!r} of shape {tuple(p.shape)} is frozen but has a "
                        "gradient, which would be used without noise: call zero_grad() where it is frozen"
                    )
        sigma, sensitivity = self._scale()
        with torch.no_grad():
            sums = mechanism.sums(parameters)
        share = self._share()
        self._account(sigma, sensitivity)
        with torch.no_grad():
            sums = mechanism.reduced(sums)
        what = parameters, sums, sigma * sensitivity, share
        try:
            if engine is None or materialize or self.materialize_grad:
                every = {
                    p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])
                }
                with mechanism.written([every[p] for p in parameters], *what):
                    yield None
            else:
                with mechanism.fused(*what) as gradients:
                    yield gradients
        finally:
            self._is_last_step_skipped = False

    def _scale(self) -> tuple[float, float]:
        """Noise multiplier and sensitivity, both as they are at the moment."""
        sigma, sensitivity = (
            check_range("noise_multiplier", float(self.noise_multiplier), 0),
            self.sensitivity,
        )
        if not 0 < sensitivity < math.inf:
            raise ValueError(f"max_grad_norm must be finite and > 0, got {self.max_grad_norm!r}")
        return sigma, sensitivity

    def _share(self) -> float:
        """What sums are multiplied by."""
        if self.loss_reduction == "sum":
            return 1.0
        return 1.0 / (self.expected_batch_size * self.accumulated_iterations)  # type: ignore[operator]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, but not sums that `accumulate()` keeps.

        Args:
            set_to_none: Taken as in torch, without effect: `p.grad` is `None` afterwards.
        """
        self._mechanism.forget(self._trainable(), self._is_last_step_skipped)
        for group in self.param_groups:
            for p in group["params"]:
                if not p.requires_grad:
                    p.grad = None

    # Checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As in torch, that of the base optimizer, with the accountant's history, if it has one.

        Key and count of the noise are in it under `reproducible=True` only.
        """
        saved = super().state_dict()
        held: dict[str, Any] = {}
        if getattr(self.accountant, "history", None) is not None:
            held["history"] = [tuple(entry) for entry in self.accountant.history]
        if self._mechanism.noise.state():
            held["noise"] = self._mechanism.noise.state()
        groups = [{**group, SAVED: held} if held else group for group in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; the noise goes on with a new key unless `reproducible`.

        Raises:
            ValueError: As in torch.
        """
        groups = state_dict["param_groups"]
        held: dict[str, Any] = next((group[SAVED] for group in groups if SAVED in group), {})
        plain = [{name: value for name, value in group.items() if name != SAVED} for group in groups]
        super().load_state_dict({**state_dict, "param_groups": plain})
        self._mechanism.noise.load(held.get("noise", {}))
        self._mechanism.share_key()
        if self.accountant is not None and "history" in held:
            self.accountant.history = [tuple(entry) for entry in held["history"]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused.

        Raises:
            TypeError: Always: a copy would clip another model, and two with one key would use noise twice.
        """
        raise TypeError(
            "a DPOptimizer cannot be copied or pickled: make one around the copy of model and optimizer; "
            "state_dict() holds what there is to keep"
        )


def check_clipping(clipping: str) -> None:
    """Refuse what there is not.

    Raises:
        ValueError: If it is neither `"flat"` nor `"per_layer"`.
    """
    if clipping not in ("flat", "per_layer"):
        raise ValueError(f"clipping must be 'flat' or 'per_layer', got {clipping!r}")


def _check_base(base: torch.optim.Optimizer) -> None:
    inner: Any = base
    while isinstance(inner, Wrapper):
        if isinstance(inner, DPOptimizer):
            raise ValueError("the optimizer is a DPOptimizer already: call its detach() first")
        if isinstance(inner, SAM):
            raise ValueError(
                "SAM cannot be made private by noise on its step: it climbs by the gradients of the same "
                "samples first, which is another release; use fastreg.MSAM, which needs none of its own"
            )
        inner = inner.base_optimizer
    if isinstance(inner, FusedOptimizer):
        if any(isinstance(component, PrivateNoise) for component in inner.components):
            raise ValueError("the optimizer is inside another DPOptimizer: call its detach() first")
        if any(isinstance(component, AdaptiveClip) for component in inner.components):
            raise ValueError(
                "AdaptiveClip measures gradients before their noise, so that what it scales by is not "
                "private: leave it out, samples are clipped by max_grad_norm"
            )
