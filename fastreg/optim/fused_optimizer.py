"""Runs an update rule and regularizers in one pass over memory, behind torch's optimizer interface.

See `fastreg/engine/README.md` for how a step runs.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..common.validation import check_choice
from ..engine import grad_scaler as amp
from ..engine import layout
from ..engine.component import Component, Phase
from ..engine.grad_norm import GradNorm
from ..engine.multi_tensor_optimizer import Gradients
from ..engine.plan import SkipStatus
from ..engine.rounding import Rounding
from . import decay
from .msam import MSAM
from .regularizers import ClipNorm
from .rules import Descend, Maximize
from .slow_weights import SlowWeights
from .swap_averages import ACTIVE, AveragingOptimizer
from .weight_averages import Average

IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
"""Keys of a group that say how a step is computed, not what: a checkpoint does not change them."""


class FusedOptimizer(AveragingOptimizer):
    """Base of the optimizers: an update rule and regularizers in one pass.

    A subclass also derives from the torch optimizer it stands in for, if there is one, and calls
    `_init_components` before the constructor of that one, which checks the arguments and makes the groups.
    """

    def _init_components(
        self, rule: Component, decay_kind: str | None, regularizers: Iterable[Component] = (),
        seed: int | None = None, bf16: str = "stochastic", state_dtype: torch.dtype | None = None,
        nonfinite: str = "propagate", **unknown: Any,
    ) -> None:  # fmt: skip
        """Puts the components together, and refuses wrong and `unknown` options, all as documented by `Adam`.

        A `decay_kind` of `None` leaves the kind to the group's `decoupled_weight_decay`.
        """
        if unknown:
            raise TypeError(f"{type(self).__name__} has no option {next(iter(unknown))!r}")
        if not isinstance(regularizers, Iterable):
            raise TypeError(f"regularizers must be a list of components, got {regularizers!r}; write [...]")
        regularizers = tuple(regularizers)
        if state_dtype is not None and not isinstance(state_dtype, torch.dtype):
            raise TypeError(f"state_dtype must be a torch.dtype such as torch.bfloat16, got {state_dtype!r}")
        if state_dtype is not None and not state_dtype.is_floating_point:
            raise ValueError(f"state_dtype must be a floating-point dtype, got {state_dtype}")
        check_choice("nonfinite", nonfinite, ("propagate", "skip", "raise"))
        self._decay_kind = decay_kind
        self._state_dtype, self._nonfinite = state_dtype, nonfinite
        self._grad_norm = GradNorm()
        msam = next((component for component in regularizers if isinstance(component, MSAM)), None)
        rule = msam.adapt(rule, decay_kind, type(self).__name__) if msam else rule
        decays = decay.Penalty(decay_kind, at_zero=msam is None), decay.Shrinkage(decay_kind)
        built_in = (Maximize(), self._grad_norm, *decays, rule, Rounding(bf16))
        self._set_regularizers(regularizers, (*built_in, Descend(msam is not None)), seed)
        amp.silence()

    def _set_regularizers(
        self, regularizers: tuple[Component, ...], built_in: Iterable[Component], seed: int | None
    ) -> None:
        """Puts the user's components between the built-in ones, and lets `GradNorm` serve them."""
        for c in regularizers:
            if not isinstance(c, Component):
                raise TypeError(f"regularizers must be components such as fastreg.ClipNorm(1.0), got {c!r}")
        names = [
            c.name if isinstance(c, Average) and not isinstance(c, SlowWeights) else type(c).__name__
            for c in regularizers
        ]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"{name!r} is given more than once; several averages need names: EMA(decay, name=...)"
                )
        clip = next((component for component in regularizers if isinstance(component, ClipNorm)), None)
        needed = [component for component in regularizers if component.needs_norm]
        if clip is not None and clip.norm_type != 2 and needed:
            raise ValueError(f"{needed[0]!r} needs the L2 norm, but {clip!r} measures another")
        *first, descend = built_in
        self._set_components((*first, *regularizers, descend), seed)
        self._regularizers, self._grad_norm.clip = regularizers, clip
        self._grad_norm.needed_by_others = bool(needed)
        self._grad_norm.nonfinite = "raise" if clip and clip.error_if_nonfinite else self._nonfinite
        self._grad_norm.stages_before = sum(component.phase < Phase.CLIP for component in self._components)

    def _replace_regularizers(self, regularizers: tuple[Component, ...]) -> None:
        built_in = [c for c in self._components if c not in self._regularizers]
        self._set_regularizers(regularizers, built_in, self._seed)

    def reset_cache(self) -> None:
        """Forgets all that is kept between steps; call it after replacing state or groups."""
        super().reset_cache()
        self._skip_status: SkipStatus | None = None
        self.skip_flags: dict[torch.device, Tensor] = {}

    # The step -------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # `torch.compiler.disable` would import Dynamo, and triton with it
    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, grad_scaler: Any = None,
        gradients: Gradients | None = None,
    ) -> Any:  # fmt: skip
        """Takes one optimization step; parameters without a gradient are left alone.

        Args:
            closure: Reevaluates the model and returns the loss.
            grad_scaler: For `torch.amp.GradScaler.step(optimizer)`, which passes itself.
            gradients: Gradients to use instead of those in `p.grad`: by parameter, or one for each parameter
                in order, `None` for those to be left alone.

        Returns:
            What the closure returns, `None` without one.

        Raises:
            RuntimeError: Inside `averaged()`, for sparse gradients, and with `nonfinite="raise"` if those of
                the last step were not finite.
        """
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if capturing:
            self._check_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if ACTIVE in self.param_groups[0]:
            self._refuse_inside("step()", "train the averaged weights")
            raise RuntimeError("step() would train the averaged weights: call optimizer.train() first")
        if self._skip_status is not None:
            self._settle(report=True)
        scaling = amp.UNSCALED
        if grad_scaler is not None or hasattr(self, "grad_scale") or hasattr(self, "found_inf"):
            scaling = amp.scaling(self, grad_scaler)
        self._grad_norm.scaling = scaling
        self._switches = (scaling.scale is None,)
        flags = self._run_step(self._operands(gradients).with_gradient())
        self.skip_flags = flags or {}
        if flags and not capturing:
            report = self._grad_norm.nonfinite == "raise" and not scaling.active
            self._skip_status = SkipStatus(next(iter(flags.values())), self._counts, report)
        return loss

    def _settle(self, report: bool = False) -> None:
        """Corrects the count of a step that was skipped on a device; runs before counts are read."""
        status = self._skip_status
        if status is not None and status.skipped() and report:
            self._skip_status = None
            if status.report:
                raise RuntimeError(
                    "the gradients of the last step were not finite; it was skipped, weights and state are "
                    "as they were before (nonfinite='skip' goes on, 'propagate' updates nevertheless)"
                )

    def _check_capture(self) -> None:
        if not all(group.get("capturable") for group in self.param_groups):
            raise RuntimeError(
                f"CUDA graph capture of {type(self).__name__}.step() needs capturable=True in every group"
            )
        if self._layout is None:
            raise RuntimeError(
                f"CUDA graph capture of the first {type(self).__name__}.step(): every replay would start "
                "from empty state; take a step before the capture"
            )

    # What surrounds the step ----------------------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """The gradient norm before clipping at the latest step, over all groups: 0-d, on the device.

        `None` without `ClipNorm` among the regularizers, and before the first step.
        """
        return self._grad_norm.norm if self._grad_norm.clip else None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether the step divides by the scale itself, read by `torch.amp.GradScaler`."""
        return amp.supports_scaling(self.param_groups, self._grad_norm.clip is not None)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's constructors set it; here it follows from the groups and components."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as in torch, with the options of components, and the seed of their random numbers."""
        self._check_buffers({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self._completed(self.param_groups[-1])
        if group.get("decay", self._decay_kind) == "independent":  # it follows the schedule alone
            group.setdefault("lr_max", float(group["lr"]))
        self._share_seed()

    def _check_buffers(self, group: dict[str, Any]) -> None:
        """Refuses buffers of components that have the same name."""
        chain = self.chain(self._completed(dict(group)), torch.float32)
        names = ["step", *(buffer.name for buffer in chain.buffers)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"{name!r} is taken in the optimizer's state; give the component another name="
                )

    def _completed(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns the group with the options of components."""
        for component in self._components:
            for key, value in component.options().items():
                group.setdefault(key, value)
        return group

    def _check_group(self, group: dict[str, Any]) -> None:
        if not group.get("differentiable"):
            return
        if group.get("fused"):
            raise RuntimeError("`fused` does not support `differentiable`")
        name = type(self).__name__
        fix = f"; use torch.optim.{name}" if hasattr(torch.optim, name) else ""
        raise ValueError(f"differentiable=True is not supported by fastreg.{name}{fix}")

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as in torch; a step that was skipped on a device does not count."""
        self._settle()
        for component in self._components:
            component.save(self.param_groups)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state as in torch, but copies tensors, and rounds nothing that was not.

        torch would share the given tensors, cast every buffer to the dtype of its parameter, and take over
        with the groups how the saved optimizer was implemented (`foreach`, `fused`, `capturable`).  Options
        that the given groups do not know keep their values.

        Raises:
            RuntimeError: Inside `averaged()`.
            ValueError: For options that are not supported, and as in torch.
        """
        self._refuse_inside("load_state_dict()", "lose what is loaded at its end")
        loaded: dict[str, Any] = {}
        previous = [
            {name: value for name, value in group.items() if name != ACTIVE} for group in self.param_groups
        ]

        def merged(group: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
            return {**kept, **group, **{name: kept[name] for name in IMPLEMENTATION if name in kept}}

        def check(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            for group, kept in zip(state_dict["param_groups"], previous, strict=False):
                self.chain(merged(group, kept), torch.float32)
            loaded.update(state_dict)

        def keep(optimizer: torch.optim.Optimizer) -> None:
            for group, kept in zip(self.param_groups, previous, strict=True):
                group.update(merged(group, kept))
            self._keep_precise(loaded)

        # As the last hook before and the first after, between which nobody else's hooks run.
        with (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(keep, prepend=True),
        ):
            super().load_state_dict(state_dict)

    def _keep_precise(self, state_dict: dict[str, Any]) -> None:
        """Copies again all tensors that torch rounded or shares, in the dtype that they have here."""
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [(p, group) for group in self.param_groups for p in group["params"]]
        for i, (parameter, group) in zip(saved_ids, parameters, strict=True):
            saved, state = state_dict["state"].get(i, {}), self.state.get(parameter, {})
            chain = self.chain(group, layout.local(parameter).dtype)
            dtypes = {buffer.name: self.buffer_dtype(chain, buffer, parameter) for buffer in chain.buffers}
            for name, value in saved.items():
                if not isinstance(value, Tensor):
                    continue
                if name in dtypes:
                    state[name] = value.to(parameter.device, dtypes[name], copy=True)
                elif state[name] is value or not (value.is_floating_point() or value.is_complex()):
                    state[name] = value.to(state[name].device, copy=True)

    def _share_seed(self) -> None:
        chains = (
            self.chain(group, dtype)
            for group in self.param_groups
            for dtype in {layout.local(p).dtype for p in group["params"]}
        )
        if any(stage.rng_keys for chain in chains for stage in chain.stages):
            for group in self.param_groups:
                group.setdefault("seed", self.seed)

    _KEPT = (*AveragingOptimizer._KEPT, "_grad_norm", "_decay_kind", "_nonfinite", "_regularizers")

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles keep the state that components save."""
        self._settle()
        for component in self._components:
            component.save(self.param_groups)
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Adds the options of components to groups of older checkpoints."""
        super().__setstate__(state)
        for group in self.param_groups:
            self._completed(group)
        for component in self._components:
            component.load(self.param_groups)
        self._share_seed()

    def add_component(self, component: Component) -> None:
        """Adds a component, as if the constructor had been given it among the regularizers.

        Raises:
            TypeError: If it is not a component.
            ValueError: If the constructor would refuse it, and for `MSAM`, which changes the update rule.
        """
        if isinstance(component, MSAM):
            raise ValueError(
                "MSAM changes the update rule: give it to the constructor, in regularizers=[...]"
            )
        previous = self._regularizers
        self._replace_regularizers((*previous, component))
        try:
            for group in self.param_groups:
                self._check_buffers(group)
        except Exception:
            self._replace_regularizers(previous)
            raise
        for group in self.param_groups:
            self._completed(group)
        self._share_seed()

    def remove_component(self, component: Component) -> None:
        """Removes one of the regularizers, given to the constructor or to `add_component`.

        Raises:
            ValueError: If it is not among them, and for `MSAM`, which changes the update rule.
        """
        if component not in self._regularizers or isinstance(component, MSAM):
            removable = [other for other in self._regularizers if not isinstance(other, MSAM)]
            raise ValueError(f"component must be one of {removable}, got {component!r}")
        self._replace_regularizers(tuple(other for other in self._regularizers if other is not component))
