"""Sharpness-aware minimization around any optimizer, fused into fastreg's.

pass 1   loss.backward()      the gradient g at w
first_step()         backup ← w, parameter ← w + ρ g/‖g‖: 4 + 16 bytes a parameter in float32
pass 2   loss.backward()      the gradient at the perturbed weights
second_step()        the base optimizer's step, which reads w from the backup: no byte more than its own
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from ..common.validation import check_choice, check_flag, check_int, check_range
from ..engine import grad_scaler as amp
from ..engine import layout
from ..engine.state import BACKUP
from .fused_optimizer import FusedOptimizer
from .perturb import PerturbByGradient
from .wrapper import Wrapper, evaluated


class SAM(Wrapper):
    """Sharpness-aware minimization: steps by the gradient at w + ρ g/‖g‖ instead of w.

    ```python
    optimizer = fastreg.SAM(model.parameters(), fastreg.AdamW, rho=0.05, lr=1e-3)

    loss(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    loss(model(x), y).backward()  # within fastreg.frozen_running_stats(model) where there is BatchNorm
    optimizer.second_step(zero_grad=True)
    ```

    Around a fastreg optimizer the weights are restored in its own pass; around any other they are copied back
    before.  They are restored bit for bit, and `data_ptr()` never changes.  `first_step` takes gradients as
    they are: scaled by a `torch.amp.GradScaler` (do not unscale them; `scaler.step(optimizer)` is the second
    step), accumulated, sharded.  Gradients that are not finite perturb nothing, and under a scaler the step
    is skipped.

    `step()` while perturbed is `second_step()`.  `step(closure)` calls the closure at the perturbed weights,
    after the caller has computed the first gradients (`closure="second"`, as davda54/sam does), or both times
    (`closure="both"`, torch's contract: the closure clears gradients, computes the loss and its gradients).
    Where no parameter has a gradient yet, the closure computes the first ones in any case.  `step` returns
    the first loss of the closure: with `closure="second"` that of the perturbed weights.

    Perturbed 16-bit weights are rounded at random: of a perturbation of 10 M bfloat16 weights with ρ = 0.05,
    rounding to nearest realises 43 % along the gradient, rounding at random all of it, with noise of 1.9 ρ
    across.  With the base's `bf16="remainder"`, backup and remainder are the float32 weight, bit for bit.

    Args:
        params: Parameters, named parameters or groups, as for any torch optimizer; groups may have a `rho`,
            `adaptive` and `eta` of their own; with a `rho` of 0 they are not perturbed, at no cost.
        base_optimizer: The class of the optimizer, or a function of params and keyword arguments.
        rho: Radius ρ of the neighbourhood; ≥ 0.  A key of the groups: schedulers may change it.
        adaptive: ASAM: w + ρ T²g/‖Tg‖ with T = |w| + eta, invariant to the scale of weights; takes a rho that
            is about ten times as large.
        eta: η of ASAM; ≥ 0, 0.01 in the paper.
        interval: Steps from one that perturbs to the next; ≥ 1.  The others are the base's.  See `due`.
        start_step: Steps before the first that perturbs; ≥ 0.
        closure: Which passes closures compute, `"second"` or `"both"`.
        sync_perturbation: Whether processes of a `DistributedDataParallel` model perturb alike.  `False`
            perturbs by each one's own gradients (m-sharpness) where the first pass is made within
            `maybe_no_sync(model)`.
        rounding: Of perturbed 16-bit weights: `"stochastic"` or `"nearest"`.
        kwargs: For the base optimizer, such as `lr`.

    Raises:
        TypeError: If base_optimizer is an optimizer instead of its class.
        ValueError: For values out of range.

    Reference:
        Foret, Kleiner, Mobahi, Neyshabur 2021, "Sharpness-aware minimization for efficiently improving
        generalization"; Kwon, Kim, Park, Choi 2021, "ASAM".
    """

    _step_supports_amp_scaling = True  # a step that a scaler leaves out would leave weights perturbed

    def __init__(
        self, params: Any, base_optimizer: Callable[..., torch.optim.Optimizer], rho: float = 0.05,
        adaptive: bool = False, *, eta: float = 0.0, interval: int = 1, start_step: int = 0,
        closure: str = "second", sync_perturbation: bool = True, rounding: str = "stochastic", **kwargs: Any,
    ) -> None:  # fmt: skip
        if isinstance(base_optimizer, torch.optim.Optimizer) or not callable(base_optimizer):
            name = type(base_optimizer).__name__
            raise TypeError(
                f"base_optimizer must be a class, got {base_optimizer!r:.60}; "
                f"write SAM(model.parameters(), {name}, lr=...)"
            )
        check_choice("closure", closure, ("second", "both"))
        self._options = {
            "rho": check_range("rho", rho, 0), "adaptive": check_flag("adaptive", adaptive),
            "eta": check_range("eta", eta, 0), "perturbed": False, "sam_step": 0,
        }  # fmt: skip
        self.interval = check_int("interval", interval, 1)
        self.start_step = check_int("start_step", start_step, 0)
        self.closure, self.sync_perturbation = closure, check_flag("sync_perturbation", sync_perturbation)
        super().__init__(base_optimizer(params, **kwargs))
        self._complete()
        for group in self.param_groups:
            _check(group)
        self._perturb = PerturbByGradient(self.param_groups, rounding)
        self._perturbed: list[Tensor] = []
        self._accumulated: dict[Tensor, Tensor] = {}
        self._bad: Tensor | None = None
        if self.fused_optimizer is not None:
            self.fused_optimizer.reads_backups = True
        amp.silence()

    def options(self) -> dict[str, Any]:
        """Returns the keys of groups, counts included."""
        options = dict(self._options)
        if self.param_groups and "sam_step" in self.param_groups[0]:
            options |= {key: self.param_groups[0][key] for key in ("perturbed", "sam_step")}
        return options

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group to the base optimizer.

        Raises:
            ValueError: For a `rho` or `eta` out of range, and as in torch.
        """
        _check({**self._options, **param_group})
        super().add_param_group(param_group)

    # State ----------------------------------------------------------------------------------------------

    @property
    def perturbed(self) -> bool:
        """Whether the next backward pass is the second: between `first_step` and `second_step`."""
        return bool(self.param_groups and self.param_groups[0].get("perturbed"))

    @property
    def due(self) -> bool:
        """Whether this step perturbs; if not, `step()` is that of the base and needs one backward pass."""
        count = self.param_groups[0]["sam_step"] - self.start_step
        return count >= 0 and count % self.interval == 0

    def __getattr__(self, name: str) -> Any:
        if name in ("eval", "averaged") and self.perturbed:
            raise RuntimeError(
                f"{name}() between first_step() and second_step(): finish the step or call restore() first"
            )
        return super().__getattr__(name)

    @property
    def perturbation_norm(self) -> Tensor | None:
        """The norm of the first gradients, as they were, at the latest `first_step`; 0-d, on the device."""
        return None if self._pass.measured is None else self._pass.measured.norm

    def _set(self, key: str, value: Any) -> None:
        for group in self.param_groups:
            group[key] = value

    @property
    def _pass(self) -> PerturbByGradient:
        self._perturb.param_groups = self.param_groups
        return self._perturb

    # Steps ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturbs the weights by their gradients.

        Weights that are still perturbed, because a second step was left out, are restored before.

        Args:
            zero_grad: Whether to clear gradients afterwards.

        Raises:
            RuntimeError: While averages are swapped in.
        """
        if self.fused_optimizer is not None and self.fused_optimizer.active_average is not None:
            raise RuntimeError("first_step() would perturb the averages: call optimizer.train() first")
        self.restore()
        if self.due:
            self._perturbed = self._pass.perturb()
            if (measured := self._pass.measured) is not None:
                self._bad = measured.bad if self._bad is None else torch.maximum(self._bad, measured.bad)
        self._set("perturbed", True)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """Restores perturbed weights without a step."""
        if self._perturbed:
            self._pass.restore(self._perturbed)
            layout.reshard(self._perturbed)  # FSDP2 may still use the perturbed ones that it has gathered
        self._perturbed = []
        self._set("perturbed", False)

    def abandon(self) -> None:
        """Gives up a step: restores perturbed weights, and drops the gradients that `accumulate` has kept."""
        self.restore()
        self._accumulated, self._bad = {}, None

    @torch.no_grad()
    def accumulate(self) -> None:
        """Restores the weights and keeps the gradients, to which the next step adds: for micro-batches.

        ```python
        for x, y in micro_batches:  # each with a perturbation of its own
            loss(model(x), y).backward()
            optimizer.first_step(zero_grad=True)
            loss(model(x), y).backward()
            optimizer.accumulate()
        optimizer.step()
        optimizer.zero_grad()
        ```

        Raises:
            RuntimeError: Before `first_step`.
        """
        if not self.perturbed:
            raise RuntimeError("accumulate() comes after first_step() and a second backward pass")
        self.restore()
        for p in self._parameters:
            if p.grad is None:
                continue
            if p in self._accumulated:
                self._accumulated[p].add_(p.grad)
            else:
                # A view, such as into a bucket of DistributedDataParallel, is written again.
                self._accumulated[p] = p.grad.clone() if p.grad._is_view() else p.grad
            p.grad = None

    def second_step(self, zero_grad: bool = False, *, grad_scaler: Any = None) -> None:
        """Restores the weights and steps by the gradients of the perturbed ones.

        Args:
            zero_grad: Whether to clear gradients afterwards.
            grad_scaler: For `torch.amp.GradScaler.step(optimizer)`, which passes itself.

        Raises:
            RuntimeError: Before `first_step`.
        """
        if not self.perturbed:
            raise RuntimeError("second_step() comes after first_step() and a second backward pass")
        self.step(grad_scaler=grad_scaler)  # so that its hooks run, and schedulers see it
        if zero_grad:
            self.zero_grad()

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scaler: Any = None) -> Any:
        """Takes the second step while perturbed, or both with a closure.

        Args:
            closure: See the class.
            grad_scaler: For `torch.amp.GradScaler.step(optimizer)`, which passes itself.

        Returns:
            The first loss of the closure, `None` without one.

        Raises:
            RuntimeError: Without a closure if `first_step` has not been called and is due; if a scaler has
                unscaled gradients beside those of `accumulate`.
        """
        loss = None
        if closure is not None:
            loss = self._passes(closure)
        elif not self.perturbed and not self._accumulated and self.due:
            raise RuntimeError(
                "step() needs the second gradients: call first_step() after the first backward pass, or pass "
                "a closure to step()"
            )
        self._descend(grad_scaler)
        return loss

    def _passes(self, closure: Callable[[], Any]) -> Any:
        """Computes the gradients to step by, and returns the first loss."""
        first = not self.perturbed and (
            self.closure == "both" or all(p.grad is None for p in self._parameters)
        )
        loss = evaluated(closure) if first else None
        if not self.perturbed:
            if not self.due:
                return loss
            self.first_step(zero_grad=True)
        try:
            second = evaluated(closure)
        except BaseException:
            self.restore()
            raise
        return loss if first else second

    @torch.no_grad()
    def _descend(self, grad_scaler: Any) -> None:
        if self._accumulated and grad_scaler is not None:
            state = grad_scaler._per_optimizer_states[id(self)]
            if state["stage"] is OptState.UNSCALED:
                raise RuntimeError(
                    "scaler.unscale_(optimizer) does not reach the gradients that accumulate() keeps: leave "
                    "unscaling to scaler.step(optimizer), and clipping to fastreg.ClipNorm"
                )
        for p, accumulated in self._accumulated.items():
            p.grad = accumulated if p.grad is None else accumulated.add_(p.grad)
        self._accumulated = {}
        perturbed, self._perturbed = self._perturbed, []
        bad, self._bad = self._bad, None
        try:
            if isinstance(self.base_optimizer, FusedOptimizer):
                self._step_fused(self.base_optimizer, perturbed, amp.scaling(self, grad_scaler), bad)
            else:
                self._pass.restore(perturbed)
                perturbed = []
                if not amp.unscale(self, grad_scaler, bad):
                    self.base_optimizer.step()
        except BaseException:
            self._pass.restore(perturbed)
            raise
        finally:
            self._set("perturbed", False)
        self._set("sam_step", self.param_groups[0]["sam_step"] + 1)
        self._opt_called = True  # schedulers warn without it

    def _step_fused(
        self, base: FusedOptimizer, perturbed: list[Tensor], scaling: amp.Scaling, bad: Tensor | None
    ) -> None:
        if bad is not None and scaling.active:
            found_inf = bad if scaling.found_inf is None else torch.maximum(scaling.found_inf.to(bad), bad)
            scaling = scaling._replace(found_inf=found_inf)
        stepped = [p for p in perturbed if p.grad is not None]
        for p in stepped:
            base.state[p][BACKUP.name] = self._pass.state[p][BACKUP.name]
        try:
            base.step(grad_scaler=scaling if scaling != amp.UNSCALED else None)
        finally:
            for p in stepped:
                base.state[p].pop(BACKUP.name, None)
        self._pass.restore([p for p in perturbed if p.grad is None])
        if base.skip_flags:  # a step that a device has skipped has not restored them
            self._pass.restore(stepped, {device: 1 - flag for device, flag in base.skip_flags.items()})

    # Several processes ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def maybe_no_sync(self, model: Any) -> Any:
        """Keeps gradients of the first pass local in the block, unless perturbations are shared.

        Args:
            model: A `DistributedDataParallel` model.

        Raises:
            TypeError: If the model has no `no_sync` and perturbations are not shared.
        """
        local = not (self.sync_perturbation or self.perturbed)
        if local and not hasattr(model, "no_sync"):
            raise TypeError(
                f"sync_perturbation=False needs a DistributedDataParallel model, got {type(model).__name__}"
            )
        with model.no_sync() if local else contextlib.nullcontext():
            yield

    # Checkpoints ----------------------------------------------------------------------------------------

    @property
    def state_holder(self) -> PerturbByGradient:
        """The pass that perturbs, whose state the backups are."""
        return self._pass

    def _saved_names(self) -> dict[str, str]:
        return self._loadable_names() if self._perturbed else {"step": "sam_count"}

    def _loadable_names(self) -> dict[str, str]:
        return {"step": "sam_count", BACKUP.name: BACKUP.name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint; one of perturbed weights goes on with the second pass."""
        super().load_state_dict(state_dict)
        state = self._pass.state
        self._perturbed = [p for p in self._parameters if BACKUP.name in state.get(p, {})]
        self._accumulated, self._bad = {}, None


def _check(group: dict[str, Any]) -> None:
    for name in ("rho", "eta"):
        check_range(name, group[name], 0)
    check_flag("adaptive", group["adaptive"])
