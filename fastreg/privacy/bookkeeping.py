"""Computes per-sample clipped gradients in one backward pass: the book-keeping of Bu et al. 2023.

    forward    every covered layer runs on detached weights and puts a tap on its output (`grad_tap.py`)
    backward   autograd computes gradients of activations only; from these and from the inputs of layers
               (`layers.py`) follow per-sample gradients (`per_sample_grads.py`) and their norms
    at its end norms are combined over layers, each sample gets its factor, each parameter its sum

Only what is clipped is trained: trainable parameters that no covered layer owns are refused by name, and so
are gradients that reach a covered parameter by another way.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from ..common.validation import check_choice, check_int
from ..ops.ghost import Grams
from ..runtime.device import capturing
from . import clipped_sums, grad_tap
from .bounds import CLIPPING, Bound, clipping_bounds, sensitivity_of
from .clipped_sums import MeasuredGrad
from .grad_tap import GradTap, LayerUse, PatchedForward
from .layers import CoveredLayer, UnsupportedLayer, cover_layer
from .precision import full_precision_no_grad

_NOT_DISTRIBUTED = (
    "DistributedDataParallel sums gradients that are not clipped: use the model by itself, DPOptimizer sums "
    "over processes"
)
SLACK = 1 + 2**-21
"""Factor on norms before they are compared, as clipping factors are rounded to the gradients' precision."""


class BookKeeping:
    """Clips the gradient of each sample of a model in one backward pass.

    After `loss.backward()`, `p.grad` of each trainable parameter is the sum over samples of clipped
    gradients, not divided by anything, in float32 for 16-bit parameters too. Further backward passes add to
    it. `p.grad` is written when the backward pass ends. A sample may be in one of these passes only: two
    passes from the same input tensor are refused, but copies of it are not noticed. Within one pass the model
    may run several times on the same samples in the same order; the sum of a sample's gradients is clipped.

    The gradient of a sample is that of its addend to the loss, times the number of samples if the loss is a
    mean over them. If a loss is a mean over tokens, the number of tokens must not depend on the samples: with
    padding, sum over samples and set `loss_reduction="sum"`. The model must not mix samples; only batch
    normalization is noticed and refused.

    A factor is min(1, C / norm), with a norm that includes a bound on its rounding error. Samples with a
    gradient that is not finite, or whose square overflows float32, are excluded.

    Args:
        model: The model whose trainable parameters are covered.
        max_grad_norm: The bound C, which may be changed between steps. With `"per_layer"` a bound for each
            trainable parameter, by name or in the order of `model.parameters()`; one number is divided: each
            of n parameters gets C / √n.
        clipping: `"flat"`, or `"per_layer"` for each parameter tensor by itself, as in Opacus.
        loss_reduction: Whether the loss is a `"mean"` over samples or their `"sum"`.
        batch_dim: The batch dimension of the inputs of all layers, 0 or 1.
        shared_inputs: Names of layers whose input has no batch dimension because all samples share it, such
            as position embeddings. Needed only where an error asks for it: ids in one dimension count as
            shared unless they are as many as samples, and an input of one sample always does.
        attach: Whether to attach at once.

    Raises:
        ValueError: For options out of range, and trainable parameters that cannot be covered.

    Reference:
        Bu et al. 2023, "Differentially private optimization on large model at small cost".
    """

    def __init__(
        self, model: nn.Module, *,
        max_grad_norm: Bound | Mapping[str, Bound] | Sequence[Bound] = 1.0,
        clipping: Literal["flat", "per_layer"] = "flat", loss_reduction: Literal["mean", "sum"] = "mean",
        batch_dim: int = 0, shared_inputs: Sequence[str] = (), attach: bool = True,
    ) -> None:  # fmt: skip
        check_choice("clipping", clipping, CLIPPING)
        check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        check_choice("batch_dim", check_int("batch_dim", batch_dim, 0), (0, 1))
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
        self.model, self.max_grad_norm, self.clipping = model, max_grad_norm, clipping
        self.loss_reduction, self.batch_dim = loss_reduction, batch_dim
        self.shared_inputs = tuple(shared_inputs)
        self.norms: Tensor | None = None
        """Norms in the last backward pass, `[batch]` in float64; not private."""
        self.samples = 0
        """Number of samples in `p.grad`."""
        self._counters: dict[torch.device, Tensor] = {}  # samples clipped and samples excluded
        self._names: dict[Parameter, str] = {}
        self._frozen: list[tuple[str, Parameter]] = []
        self._reused: set[Parameter] = set()  # parameters with several uses in a pass
        self._undo: list[Any] = []
        self._depth = 0  # of calls of the model
        self._batch_size: int | None = None
        self._batch: Any = None  # identity of the input of the model
        self._pass_batches: set[Any] = set()
        self._summed_batches: set[Any] = set()
        self._bounds_used: list[Bound] = []
        self._task: int | None = None
        self._uses: dict[Parameter, list[MeasuredGrad]] = {}
        self._grams = Grams()
        if attach:
            self.attach()

    @property
    def parameters(self) -> dict[str, Parameter]:
        """The covered parameters by name, including those frozen since."""
        return {name: p for p, name in self._names.items()}

    @property
    def attached(self) -> bool:
        """Whether gradients of the model are clipped."""
        return bool(self._undo)

    @property
    def clipped_samples(self) -> Tensor:
        """Number of samples clipped so far: int64, 0-d, on the device; not private."""
        return self._counter()[0]

    @property
    def nonfinite_samples(self) -> Tensor:
        """Number of samples excluded so far as not finite: int64, 0-d, on the device; not private."""
        return self._counter()[1]

    @property
    def sensitivity(self) -> float | Tensor:
        """The largest change of all `p.grad` together by one sample: C, or √(Σ C²) over layers."""
        return sensitivity_of(self._bounds())

    @property
    def clipped_to(self) -> set[float]:
        """The sensitivities to which the samples in `p.grad` were clipped."""
        return {float(bound) for bound in self._bounds_used}

    def attach(self) -> None:
        """Clips gradients of the model from now on.

        Raises:
            ValueError: If a trainable parameter cannot be covered, by its name; nothing is attached then.
        """
        if self.attached:
            return
        names, layers = self._cover()
        if unknown := set(self.shared_inputs) - {name for name, _ in layers.values()}:
            raise ValueError(f"shared_inputs names no layer that is covered: {min(unknown)!r}")
        self._bounds(list(names.values()))
        self._names = names
        self._frozen = [(n, p) for n, p in self.model.named_parameters() if p not in names]
        for module, (name, layer) in layers.items():
            module.forward = PatchedForward(self, name, layer, name in self.shared_inputs or None)
            self._undo.append(functools.partial(vars(module).pop, "forward"))
        for p, name in names.items():
            self._undo.append(p.register_hook(functools.partial(grad_tap.refuse_unclipped, name)).remove)
            if p.dtype.itemsize < 4:
                self._undo.append(functools.partial(setattr, p, "grad_dtype", p.grad_dtype))
                p.grad_dtype = torch.float32
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                self._undo.append(module.register_forward_pre_hook(grad_tap.refuse_batch_statistics).remove)
        enter = self.model.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
        leave = self.model.register_forward_hook(self._leave, always_call=True)
        self._undo += [enter.remove, leave.remove]

    def detach(self) -> None:
        """Restores the model; `p.grad` is kept unless its dtype is not that of a 16-bit parameter."""
        for p in self._names:
            if p.grad is not None and p.grad.dtype != p.dtype:
                p.grad = None
        while self._undo:
            self._undo.pop()()
        self._names, self._frozen = {}, []
        self.reset()

    def reset(self) -> None:
        """Drops samples and unfinished passes; `p.grad` is left alone."""
        self._depth = 0  # an interrupted forward pass did not call _leave
        self._forget_samples()
        self._drop_pass()

    def _forget_samples(self) -> None:
        self.samples = 0
        self._summed_batches, self._bounds_used = set(), []

    def _drop_pass(self) -> None:
        if self._task is not None or self._uses:
            self._task, self._uses = None, {}
            self._grams.forget()

    def _cover(self) -> tuple[dict[Parameter, str], dict[nn.Module, tuple[str, CoveredLayer]]]:
        """Returns trainable parameters and the layers that own them, with their names."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            raise ValueError(_NOT_DISTRIBUTED)
        names = {p: name for name, p in self.model.named_parameters() if p.requires_grad}
        layers: dict[nn.Module, tuple[str, CoveredLayer]] = {}
        owners: Counter[Parameter] = Counter()
        for name, module in self.model.named_modules():
            trained = {key: p for key, p in module._parameters.items() if p is not None and p in names}
            if not trained:
                continue
            owners.update(trained.values())
            try:
                if name.rpartition(".")[2] == "relative_attention_bias":
                    raise UnsupportedLayer("it is used without samples: freeze it")
                layers[module] = name, cover_layer(module)
            except UnsupportedLayer as why:
                parameter = ".".join(filter(None, (name, next(iter(trained)))))
                raise ValueError(
                    f"no per-sample gradients of parameter {parameter!r} of {type(module).__name__}: {why}"
                ) from None
        self._reused = {p for p, count in owners.items() if count > 1}
        return names, layers

    def _bounds(self, names: Sequence[str] = ()) -> list[Bound]:
        names = names or list(self._names.values())
        return clipping_bounds(self.max_grad_norm, self.clipping, len(names), names)

    def _counter(self, device: torch.device | None = None) -> Tensor:
        if device is None:
            device = next(iter(self._counters), torch.device("cpu"))
        if device not in self._counters:
            self._counters[device] = torch.zeros(2, dtype=torch.int64, device=device)
        return self._counters[device]

    # Forward

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None) is not None:
            raise RuntimeError(_NOT_DISTRIBUTED)
        if self._depth == 0:
            x = grad_tap.main_input(args, kwargs, self.batch_dim)
            self._batch_size = None if x is None else x.shape[self.batch_dim]
            self._batch = None if x is None or torch.compiler.is_compiling() else grad_tap.tensor_identity(x)
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        self._depth = max(0, self._depth - 1)

    def run(self, forward: PatchedForward, x: Tensor) -> Tensor:
        """Runs a covered layer and puts a tap on its output."""
        layer, module = forward.layer, forward.layer.module
        task = torch._C._current_graph_task_id()
        if task == -1:
            self._drop_pass()  # a backward pass that failed
        needed = [name for name, p in module._parameters.items() if p is not None and p.requires_grad]
        params = [module._parameters[name] for name in needed]
        for name, p in zip(needed, params, strict=True):
            if p not in self._names:
                raise RuntimeError(
                    f"parameter {name!r} of {forward.name!r} is not the one that was there when gradients "
                    "were taken over: call detach() and attach() again"
                )
        if not self._depth and task == -1:  # but a checkpoint recomputes layers in the backward pass
            raise RuntimeError(
                f"{forward.name!r} was called outside of the model's forward(), where it is not known what "
                "its samples are: call the model, or give the module that is called as the model"
            )
        if self._batch_size is None:
            raise RuntimeError(
                f"no input of the model tells {forward.name!r} how many samples there are: give the model a "
                f"tensor with samples in dimension {self.batch_dim}"
            )
        x = forward.expand_input(x, self._batch_size, self.batch_dim)
        out, saved = layer.run(x.movedim(1, 0) if self.batch_dim else x)
        use = LayerUse(self, layer, needed, task, self._batch)
        out = GradTap.apply(out, use, len(saved), *(t.detach() for t in saved), *params)
        return out.movedim(0, 1) if self.batch_dim else out

    # Backward

    def record(self, use: LayerUse, saved: tuple[Tensor, ...], grad: Tensor, wanted: list[str]) -> None:
        """Computes per-sample gradients of a layer's `wanted` parameters when autograd reaches it.

        They follow from the tensors that the layer saved in this use, and the gradient of its output.
        """
        task = torch._C._current_graph_task_id()
        if use.task != -1:
            raise RuntimeError(
                "reentrant checkpoints run backward passes within backward passes, which cannot be clipped "
                "together: use_reentrant=False"
            )
        if task != self._task:
            if self._uses:
                self._drop_pass()
                raise RuntimeError(
                    "another backward pass did not end: call zero_grad() and reset(), and start anew"
                )
            self._task = task
            self._pass_batches = set()
            torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._finish, task))
        if use.batch is not None and use.batch not in self._pass_batches:
            if use.batch in self._summed_batches and any(p.grad is not None for p in self._names):
                raise RuntimeError(
                    "a second backward pass from the same input would count its samples twice: add up losses "
                    "and call backward() once, or zero_grad() in between"
                )
            self._pass_batches.add(use.batch)
        with full_precision_no_grad(grad.device):
            for name, sample_grads in use.layer.per_sample_grads(saved, grad, wanted).items():
                p = use.layer.module._parameters[name]
                if p in self._uses:
                    self._reused.add(p)
                if p in self._reused:
                    measured = MeasuredGrad(sample_grads)  # only the norm of the sum counts
                else:
                    measured = clipped_sums.measure(sample_grads, self._grams)
                self._uses.setdefault(p, []).append(measured)

    def _finish(self, task: int) -> None:
        """Clips and sums when the backward pass has ended."""
        if task != self._task:
            return
        uses, self._uses = self._uses, {}
        self._drop_pass()
        for name, p in self._frozen:
            if p.requires_grad:
                raise RuntimeError(
                    f"parameter {name!r} became trainable after gradients were taken over: call detach() and "
                    "attach() again"
                )
        samples, *others = sizes = sorted({m.grad.samples for measured in uses.values() for m in measured})
        if others:
            raise RuntimeError(
                f"layers have seen {sizes} samples: the first input of the model must tell how many"
            )
        device = next(iter(uses)).device
        with full_precision_no_grad(device):
            if all(p.grad is None for p in self._names):
                self._forget_samples()
            self._clip(uses, samples, device)
        self.samples += samples

    def _clip(self, uses: dict[Parameter, list[MeasuredGrad]], samples: int, device: torch.device) -> None:
        bound, flat = self.sensitivity, self.clipping == "flat"
        self._bounds_used.append(bound.clone() if isinstance(bound, Tensor) else bound)
        self._summed_batches |= self._pass_batches
        owners, measured = clipped_sums.group_grads(uses, stack=flat)
        uses.clear()  # so that each gradient is released after it is summed
        squares, errors = clipped_sums.squared_norms(measured, device)
        scale = samples if self.loss_reduction == "mean" else 1
        squares = squares.clamp(min=0)
        upper = squares + errors
        upper = (upper.sum(0, keepdim=True) if flat else upper).sqrt() * (scale * SLACK)
        self.norms = squares.sum(0).sqrt() * scale
        finite = upper.isfinite().all(0)
        factors = (self._limits(owners, device, upper.dtype) / upper).clamp(max=1)
        factors = torch.where(finite, factors, 0.0)
        self._counter(device).add_(torch.stack(((factors < 1).any(0) & finite, ~finite)).sum(1))
        # If all are finite, as almost always, nothing has to be masked.
        mask = None if not capturing(device) and bool(finite.all()) else finite
        clipped_sums.add_weighted_sums(owners, measured, factors * scale, mask)

    def _limits(self, owners: list[list[Parameter]], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Returns the bounds as `[1, 1]`, or `[len(owners), 1]` if each parameter has its own."""
        bounds = self._bounds()
        if self.clipping == "per_layer":
            by_parameter = dict(zip(self._names, bounds, strict=True))
            bounds = [by_parameter[p] for (p,) in owners]
        if any(isinstance(bound, Tensor) for bound in bounds):
            limits = torch.stack([torch.as_tensor(bound).to(device, dtype).reshape(()) for bound in bounds])
        else:
            limits = torch.tensor(bounds, dtype=dtype, device=device)
        return limits.unsqueeze(1)
