"""Takes steps of DP-SGD around any optimizer: accounts for a step, adds noise, steps.

accountant        is told of the step before anything is released
noise             (sum + σ·C·N(0, 1)) / expected batch size, as the first stage of a fastreg optimizer
base optimizer    steps by nothing else, which is post-processing
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..common.validation import check_choice, check_flag, check_range
from ..engine.component import Phase
from ..optim.fused_optimizer import FusedOptimizer
from ..optim.sam import SAM
from ..optim.wrapper import Wrapper, evaluated
from .accounting import Accounted, spent
from .grad_sources import ClippedGradSource, Parameters
from .mechanism import Mechanism
from .noise import NoiseKey, PrivateNoise

SAVED = "privacy"
"""Key of a parameter group under which a checkpoint holds the accountant's history and the noise key."""


class PrivateStep(Wrapper):
    """Adds noise to sums of clipped gradients, and lets any optimizer step by them; see `DPOptimizer`."""

    _step_supports_amp_scaling = True  # so that a GradScaler passes itself, and is refused

    def __init__(
        self, base: torch.optim.Optimizer, source: ClippedGradSource, noise: NoiseKey, *,
        noise_multiplier: float, expected_batch_size: float | None, loss_reduction: str,
        materialize_grad: bool, process_group: Any = None,
    ) -> None:  # fmt: skip
        inner = _checked(base)
        check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        if loss_reduction == "mean":
            if expected_batch_size is None:
                raise ValueError(
                    "expected_batch_size must be given where the loss is a mean: the sample rate times the "
                    "public size of the data, got None"
                )
            check_range("expected_batch_size", expected_batch_size, 0, above=True)
        super().__init__(base)
        self.loss_reduction, self.expected_batch_size = loss_reduction, expected_batch_size
        self.noise_multiplier: Any = check_range("noise_multiplier", noise_multiplier, 0)
        self.materialize_grad = check_flag("materialize_grad", materialize_grad)
        self.step_hook: Callable[[Any], None] | None = None
        self.accountant: Any = None
        self.sample_rate: float | None = None
        self._step_skip_queue: list[bool] = []
        self._is_last_step_skipped = False
        self._names: dict[Tensor, str] = {}
        self._source = source
        self._mechanism = Mechanism(source, noise, process_group)
        component = self._mechanism.component
        if isinstance(inner, FusedOptimizer):
            inner.add_component(component)
            self._restore: Callable[[], None] = functools.partial(inner.remove_component, component)
        else:
            self._restore = inner.register_step_pre_hook(lambda *_: component.prepare()).remove

    def detach(self) -> torch.optim.Optimizer:
        """Restores the optimizer and returns it."""
        self._restore()
        return self.base_optimizer

    # Values that may be read and changed between steps

    @property
    def original_optimizer(self) -> torch.optim.Optimizer:
        """The wrapped optimizer, as Opacus calls it."""
        return self.base_optimizer

    @property
    def max_grad_norm(self) -> Any:
        """The bound C: one number, or one for each parameter."""
        return self._source.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: Any) -> None:
        self._source.max_grad_norm = value

    @property
    def clipping(self) -> str:
        """The kind of clipping, `"flat"` or `"per_layer"`."""
        return self._source.clipping

    @property
    def sensitivity(self) -> float:
        """The largest change of the sum of clipped gradients by one sample."""
        return float(self._source.sensitivity)

    @property
    def params(self) -> list[Tensor]:
        """The trainable parameters of all groups."""
        return list(self._trainable())

    @property
    def accumulated_iterations(self) -> int:
        """Factor on the sampling rate of the next step, for batches that were accumulated."""
        return self._source.iterations(self._trainable())

    def _trainable(self) -> Parameters:
        parameters = {}
        for group in self.param_groups:
            names = group.get("param_names") or [None] * len(group["params"])
            for p, name in zip(group["params"], names, strict=True):
                if p.requires_grad:
                    parameters[p] = self._names.get(p) or name or f"a parameter of shape {tuple(p.shape)}"
        return parameters

    # Accounting

    def attach_step_hook(self, fn: Callable[[Any], None]) -> None:
        """Calls `fn(optimizer)`, such as an `accountant.get_optimizer_hook_fn(rate)`, before each step."""
        self.step_hook = fn

    def epsilon(self, delta: float) -> Accounted:
        """Returns the ε of (ε, δ)-differential privacy spent so far for a δ in (0, 1), from the accountant.

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
        """Reports the step to the accountant; refuses hooks that change the noise."""
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

    # Steps

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Queues whether a coming `step()` only accumulates."""
        self._step_skip_queue.append(do_skip)

    def _check_skip_next_step(self, pop_next: bool = True) -> bool:
        if not self._step_skip_queue:
            return False
        return self._step_skip_queue.pop(0) if pop_next else self._step_skip_queue[0]

    @torch.no_grad()
    def accumulate(self) -> None:
        """Clips gradients and keeps their sum for the next step, for a part of a batch."""
        self._source.accumulate(self._trainable())
        self._is_last_step_skipped = True

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scaler: Any = None) -> Any:
        """Takes a step with noise and accounts for it, or only accumulates after `signal_skip_step()`.

        Args:
            closure: Computes gradients and returns the loss.
            grad_scaler: Refused.

        Returns:
            The result of the closure, `None` without one.

        Raises:
            RuntimeError: Under a `torch.amp.GradScaler`, in a CUDA graph, and for gradients that are not
                clipped.
            ValueError: For parameters without gradients of single samples.
        """
        self._check_step(grad_scaler)
        loss = None if closure is None else evaluated(closure)
        if self._check_skip_next_step():
            self.accumulate()
        else:
            with self._release() as gradients:
                base: Any = self.base_optimizer
                base.step() if gradients is None else base.step(gradients=gradients)
        self._opt_called = True  # read by schedulers, which warn if they step before the optimizer
        return loss

    def _check_step(self, grad_scaler: Any) -> None:
        if grad_scaler is not None:
            raise RuntimeError(
                "a torch.amp.GradScaler would have scaled gradients clipped to max_grad_norm: leave it out "
                "and use autocast with bfloat16, which needs none"
            )
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph would add the same noise at every replay: step() cannot be captured"
            )
        self._mechanism.check_cleared()

    @contextlib.contextmanager
    def _release(self, materialize: bool = False) -> Iterator[dict[Tensor, Tensor] | None]:
        """Accounts for a step and lets the base optimizer take it within the block.

        Yields:
            The gradients to step by, to which the step itself adds the noise; `None`: those in `p.grad`,
            always so if `materialize`.
        """
        parameters, mechanism = self._trainable(), self._mechanism
        everything = [p for group in self.param_groups for p in group["params"]]
        for p in everything:
            if p.grad is not None and not p.requires_grad:
                raise RuntimeError(
                    f"parameter {self._names.get(p, '')!r} of shape {tuple(p.shape)} is frozen but has a "
                    "gradient, which would be used without noise: call zero_grad() where it is frozen"
                )
        sigma, sensitivity = self._noise_scale()
        with torch.no_grad():
            sums = mechanism.sums(parameters)
        share = self._share()
        self._account(sigma, sensitivity)
        with torch.no_grad():
            sums = mechanism.all_reduce(sums)
        try:
            streams = None
            if self.fused_optimizer is None or materialize or self.materialize_grad:
                streams = [i for i, p in enumerate(everything) if p in parameters]
            with mechanism.released(parameters, sums, sigma * sensitivity, share, streams) as gradients:
                yield gradients
        finally:
            self._is_last_step_skipped = False

    def _noise_scale(self) -> tuple[float, float]:
        """Returns the current noise multiplier and sensitivity."""
        sigma = check_range("noise_multiplier", float(self.noise_multiplier), 0)
        sensitivity = self.sensitivity
        if not 0 < sensitivity < math.inf:
            raise ValueError(f"max_grad_norm must be finite and > 0, got {self.max_grad_norm!r}")
        return sigma, sensitivity

    def _share(self) -> float:
        """Returns the factor on sums, which divides by the batch size for a mean."""
        if self.loss_reduction == "sum":
            return 1.0
        return 1.0 / (self.expected_batch_size * self.accumulated_iterations)  # type: ignore[operator]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients, but not sums that `accumulate()` keeps.

        Args:
            set_to_none: Accepted as in torch, without effect: `p.grad` is `None` afterwards.
        """
        self._mechanism.clear(self._trainable(), self._is_last_step_skipped)
        for group in self.param_groups:
            for p in group["params"]:
                if not p.requires_grad:
                    p.grad = None

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the base optimizer with the accountant's history, if it has one.

        Key and count of the noise are included under `reproducible=True` only.
        """
        saved = super().state_dict()
        extra: dict[str, Any] = {}
        if getattr(self.accountant, "history", None) is not None:
            extra["history"] = [tuple(entry) for entry in self.accountant.history]
        if noise := self._mechanism.noise.state():
            extra["noise"] = noise
        groups = [{**group, SAVED: extra} if extra else group for group in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state as in torch; the noise gets a new key unless `reproducible`.

        Raises:
            ValueError: As in torch.
        """
        groups = state_dict["param_groups"]
        extra: dict[str, Any] = next((group[SAVED] for group in groups if SAVED in group), {})
        plain = [{name: value for name, value in group.items() if name != SAVED} for group in groups]
        super().load_state_dict({**state_dict, "param_groups": plain})
        self._mechanism.noise.load(extra.get("noise", {}))
        self._mechanism.share_key()
        if self.accountant is not None and "history" in extra:
            self.accountant.history = [tuple(entry) for entry in extra["history"]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuses copies, which would clip another model and use noise twice.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "a DPOptimizer cannot be copied or pickled: make one around the copy of model and optimizer; "
            "state_dict() holds what there is to keep"
        )


def _checked(base: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Returns the innermost optimizer; refuses any that does more than post-process the noised sums."""
    inner: Any = base
    while isinstance(inner, Wrapper):
        if isinstance(inner, PrivateStep):
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
        for component in inner.components:
            if component.reads_gradients or component.phase <= Phase.PRIVACY:
                raise ValueError(
                    f"{type(component).__name__} may read gradients before their noise, which is not "
                    "private: leave it out, samples are clipped by max_grad_norm; if its `prepare` and "
                    "`finish` read none, set reads_gradients = False, and a phase after Phase.PRIVACY"
                )
    return inner
