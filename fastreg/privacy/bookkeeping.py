"""Per-sample clipped gradients by one backward pass: the book-keeping of Bu et al. 2023.

    forward    every covered layer runs on detached weights and leaves a tap on its output
    backward   autograd computes gradients of activations alone; each tap notes what its layer was given and
               got (`layers.py`), as parts of per-sample gradients (`parts.py`), with their norms
    its end    norms are combined over layers, every sample gets its factor, every parameter its sum

Nothing is trained that is not clipped: parameters that no covered layer owns are refused by name, and so are
gradients that reach a covered parameter by another way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.ghost import Grams, ghost_sums
from ..reference.step import compute_dtype
from .layers import Layer, Refused, layer_of
from .norms import Noted, ghostly, measured, small
from .parts import Convolution, Dense, Outer, Part, Stacked, joined
from .precision import plainly
from .taps import Forward, Tap, counts_up, identity, main_input, no_batch_statistics, refuse

Bound = float | Tensor

_NOT_DISTRIBUTED = (
    "DistributedDataParallel sums gradients that are not clipped: use the model by itself, DPOptimizer sums "
    "over processes"
)
SLACK = 1 + 2**-21
"""What a norm is multiplied with before it is compared: factors are rounded to the precision of gradients."""


class BookKeeping:
    """Per-sample clipped gradients of a model by one backward pass.

    After `loss.backward()`, `p.grad` of every trainable parameter is the sum over the samples of their
    clipped gradients, divided by nothing, in float32 for 16-bit parameters too; further backward passes add
    to it.  `p.grad` is written when the backward pass ends.  A sample may be in one of these passes only:
    two that start from the same input tensor are refused, copies of it are not noticed.  Within one pass the
    model may run several times, on the same samples in the same order: what sample i gets is clipped as one.

    The gradient of a sample is that of what it adds to the loss, times the number of samples if the loss is
    a mean over them.  Where a loss is a mean over tokens, its number of tokens must not depend on the
    samples: with padding, sum what each sample adds and say `loss_reduction="sum"`.  Samples must not mix
    within the model: only layers of a batch (BatchNorm) are noticed and refused.

    A factor is min(1, C / norm) with a norm that is never too small: what rounding may have taken from it is
    added.  Samples with a gradient that is not finite, or whose square overflows float32, count for nothing.

    Args:
        model: Whose trainable parameters are covered.
        max_grad_norm: The bound C, which may be changed between steps.  With `"per_layer"` a bound for each
            trainable parameter, by name or in the order of `model.parameters()`; one number is shared out:
            each of n parameters gets C / √n.
        clipping: `"flat"` or `"per_layer"` (every parameter tensor by itself, as Opacus has it).
        loss_reduction: Whether the loss is a `"mean"` over the samples or their `"sum"`.
        batch_dim: Where the samples are in the input of every layer, 0 or 1.
        shared_inputs: Names of layers whose input has no dimension of samples, as they all share it, such as
            embeddings of positions.  Ids in one dimension are taken for that where they are not as many as
            samples, and so is an input of one sample; this is for when it cannot be told.
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
        for name, value, allowed in (
            ("clipping", clipping, ("flat", "per_layer")),
            ("loss_reduction", loss_reduction, ("mean", "sum")),
            ("batch_dim", batch_dim, (0, 1)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be {allowed[0]!r} or {allowed[1]!r}, got {value!r}")
        self.model, self.max_grad_norm, self.clipping = model, max_grad_norm, clipping
        self.loss_reduction, self.batch_dim = loss_reduction, batch_dim
        self.shared_inputs = tuple(shared_inputs)
        self.norms: Tensor | None = None
        """`[batch]` in double, the norms at the latest backward pass; not private."""
        self.samples = 0
        """How many samples are in `p.grad`."""
        self._counts: dict[torch.device, Tensor] = {}
        self._names: dict[Parameter, str] = {}
        self._frozen: list[tuple[str, Parameter]] = []
        self._shared: set[Parameter] = set()
        self._undo: list[Any] = []
        self._batch: int | None = None
        self._input: Any = None
        self._inputs: set[Any] = set()  # of the pass at hand, and of those in `p.grad`
        self._counted: set[Any] = set()
        self._clipped_to: list[Bound] = []
        self._within = 0
        self._task: int | None = None
        self._noted: dict[Parameter, list[Noted]] = {}
        self._grams = Grams()
        if attach:
            self.attach()

    @property
    def parameters(self) -> dict[str, Parameter]:
        """The parameters that are covered, by name; those that are frozen at the moment too."""
        return {name: p for p, name in self._names.items()}

    @property
    def attached(self) -> bool:
        """Whether gradients of the model are clipped."""
        return bool(self._undo)

    @property
    def clipped_samples(self) -> Tensor:
        """How many samples were clipped so far, int64, 0-d, on the device; not private."""
        return self._count()[0]

    @property
    def nonfinite_samples(self) -> Tensor:
        """How many samples counted for nothing so far, as their gradient was not finite: likewise."""
        return self._count()[1]

    @property
    def sensitivity(self) -> float | Tensor:
        """By how much one sample changes all `p.grad` together at most: C, or √(Σ C²) over the layers."""
        if self.clipping == "flat":
            return self._bounds()[0]
        bounds = self._bounds()
        if any(isinstance(bound, Tensor) for bound in bounds):
            return torch.stack([torch.as_tensor(bound).double() for bound in bounds]).norm()
        return math.hypot(*bounds)

    @property
    def clipped_to(self) -> set[float]:
        """The sensitivities with which what is in `p.grad` was clipped."""
        return {float(bound) for bound in self._clipped_to}

    def attach(self) -> None:
        """Take over the gradients of the model.

        Raises:
            ValueError: If a trainable parameter cannot be covered, by its name; nothing is attached then.
        """
        if self.attached:
            return
        names, layers = self._covered()
        if unknown := set(self.shared_inputs) - {name for name, _ in layers.values()}:
            raise ValueError(f"shared_inputs names no layer that is covered: {min(unknown)!r}")
        self._bounds(len(names), list(names.values()))
        self._names = names
        self._frozen = [(n, p) for n, p in self.model.named_parameters() if p not in names]
        for module, (name, layer) in layers.items():
            module.forward = Forward(self, name, layer, name in self.shared_inputs or None)
            self._undo.append(functools.partial(vars(module).pop, "forward"))
        for p, name in names.items():
            self._undo.append(p.register_hook(functools.partial(refuse, name)).remove)
            if p.dtype.itemsize < 4:
                self._undo.append(functools.partial(setattr, p, "grad_dtype", p.grad_dtype))
                p.grad_dtype = torch.float32
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                self._undo.append(module.register_forward_pre_hook(no_batch_statistics).remove)
        enter = self.model.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
        leave = self.model.register_forward_hook(self._leave, always_call=True)
        self._undo += [enter.remove, leave.remove]

    def detach(self) -> None:
        """Give the gradients back to autograd; `p.grad` is left alone, but for its dtype with 16 bits."""
        for p in self._names:
            if p.grad is not None and p.grad.dtype != p.dtype:
                p.grad = None
        while self._undo:
            self._undo.pop()()
        self._names, self._frozen = {}, []
        self.reset()

    def reset(self) -> None:
        """Forget samples and unfinished passes; `p.grad` is left alone."""
        self._within = 0  # a forward pass that was interrupted does not leave
        self._fresh()
        self._drop()

    def _fresh(self) -> None:
        self.samples = 0
        self._counted, self._clipped_to = set(), []

    def _covered(self) -> tuple[dict[Parameter, str], dict[nn.Module, tuple[str, Layer]]]:
        """Trainable parameters and the layers that own them."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            raise ValueError(_NOT_DISTRIBUTED)
        names = {p: name for name, p in self.model.named_parameters() if p.requires_grad}
        layers: dict[nn.Module, tuple[str, Layer]] = {}
        owners: dict[Parameter, int] = {}
        for name, module in self.model.named_modules():
            own = {key: p for key, p in module._parameters.items() if p is not None and p in names}
            if not own:
                continue
            for p in own.values():
                owners[p] = owners.get(p, 0) + 1
            try:
                if name.rpartition(".")[2] == "relative_attention_bias":
                    raise Refused("it is used without samples: freeze it")
                layers[module] = name, layer_of(module)
            except Refused as why:
                parameter = ".".join(filter(None, (name, next(iter(own)))))
                raise ValueError(
                    f"no per-sample gradients of parameter {parameter!r} of {type(module).__name__}: {why}"
                ) from None
        self._shared = {p for p, count in owners.items() if count > 1}
        return names, layers

    def _bounds(self, count: int | None = None, names: Sequence[str] = ()) -> list[Bound]:
        """One bound, or that of each parameter."""
        count, names = count or len(self._names), names or list(self._names.values())
        given: Any = self.max_grad_norm
        if isinstance(given, Mapping):
            if missing := [name for name in names if name not in given]:
                raise ValueError(f"max_grad_norm has no bound for parameter {missing[0]!r}")
            bounds = [given[name] for name in names]
        elif isinstance(given, Sequence):
            bounds = list(given)
        else:
            shares = count if self.clipping == "per_layer" else 1
            bounds = [given / math.sqrt(shares) if shares > 1 else given] * shares
        if len(bounds) != (count if self.clipping == "per_layer" else 1):
            raise ValueError(
                f"max_grad_norm must be one number{'' if self.clipping == 'flat' else f' or {count}'} "
                f"with clipping={self.clipping!r}, got {len(bounds)}"
            )
        for bound in bounds:
            if not isinstance(bound, Tensor) and not bound > 0:
                raise ValueError(f"max_grad_norm must be > 0, got {bound}")
        return bounds

    def _count(self, device: torch.device | None = None) -> Tensor:
        if device is None:
            device = next(iter(self._counts), torch.device("cpu"))
        if device not in self._counts:
            self._counts[device] = torch.zeros(2, dtype=torch.int64, device=device)
        return self._counts[device]

    # Forward

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None) is not None:
            raise RuntimeError(_NOT_DISTRIBUTED)
        if self._within == 0:
            x = main_input(args, kwargs, self.batch_dim)
            self._batch = None if x is None else x.shape[self.batch_dim]
            self._input = None if x is None or torch.compiler.is_compiling() else identity(x)
        self._within += 1

    def _leave(self, *_: Any) -> None:
        self._within = max(0, self._within - 1)

    def run(self, forward: Forward, x: Tensor) -> Tensor:
        """A layer, with a tap on its output."""
        layer, module = forward.layer, forward.layer.module
        if torch._C._current_graph_task_id() == -1:
            self._drop()  # what is left of a backward pass that failed
        needed = [name for name, p in module._parameters.items() if p is not None and p.requires_grad]
        params = [module._parameters[name] for name in needed]
        for name, p in zip(needed, params, strict=True):
            if p not in self._names:
                raise RuntimeError(
                    f"parameter {name!r} of {forward.name!r} is not the one that was there when gradients "
                    "were taken over: call detach() and attach() again"
                )
        x = self._with_samples(forward, x)
        first = x.movedim(self.batch_dim, 0)
        out, kept = layer.run(first if self.batch_dim else x)
        use = self, layer, needed, torch._C._current_graph_task_id(), self._input
        out = Tap.apply(out, use, len(kept), *(t.detach() for t in kept), *params)
        return out.movedim(0, self.batch_dim) if self.batch_dim else out

    def _with_samples(self, forward: Forward, x: Tensor) -> Tensor:
        """The input with all samples: one that is the same for all of them is expanded."""
        recomputed = not self._within and torch._C._current_graph_task_id() != -1
        size, dim = self._batch, self.batch_dim
        if not (self._within or recomputed):
            raise RuntimeError(
                f"{forward.name!r} was called outside of the model's forward(), where it is not known what "
                "its samples are: call the model, or give the module that is called as the model"
            )
        if size is None:
            raise RuntimeError(
                f"no input of the model tells {forward.name!r} how many samples there are: give the model a "
                f"tensor with samples in dimension {dim}"
            )
        own = x.shape[dim] if x.dim() > dim else None
        if own == 1 and x.dim() > 1:
            return x.expand(*x.shape[:dim], size, *x.shape[dim + 1 :])
        ids = x.dim() == 1 and not x.is_floating_point() and (own != size or size > 1)
        if forward.shared is None and ids:
            if own == size and counts_up(x):
                raise ValueError(
                    f"{forward.name!r} was given {own} ids that count up in a batch of {size} samples: "
                    "if they are positions, the same for all samples, say "
                    f"shared_inputs=({forward.name!r},) or give them as [1, positions]"
                )
            forward.shared = own != size
        if forward.shared:
            return x.unsqueeze(dim).expand(*x.shape[:dim], size, *x.shape[dim:])
        if own == size:
            return x
        raise ValueError(
            f"the input {list(x.shape)} of {forward.name!r} should have the {size} samples of the batch in "
            f"dimension {dim}; freeze the layer, or let it keep samples apart"
        )

    # Backward

    def note(
        self,
        layer: Layer,
        kept: tuple[Tensor, ...],
        grad: Tensor,
        needed: list[str],
        inside: int,
        source: Any,
    ) -> None:
        """What a layer gives to its parameters."""
        task = torch._C._current_graph_task_id()
        if inside != -1:
            raise RuntimeError(
                "reentrant checkpoints run backward passes within backward passes, which cannot be clipped "
                "together: use_reentrant=False"
            )
        if task != self._task:
            if self._noted:
                self._drop()
                raise RuntimeError(
                    "another backward pass did not end: call zero_grad() and reset(), and start anew"
                )
            self._task = task
            self._inputs = set()
            torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._finish, task))
        if source is not None and source not in self._inputs:
            if source in self._counted and any(p.grad is not None for p in self._names):
                raise RuntimeError(
                    "a second backward pass from the same input would count its samples twice: add up losses "
                    "and call backward() once, or zero_grad() in between"
                )
            self._inputs.add(source)
        with plainly(grad.device):
            for name, part in layer.parts(kept, grad, needed).items():
                p = layer.module._parameters[name]
                known = self._noted.setdefault(p, [])
                if known:
                    self._shared.add(p)
                known.append(Noted(part) if p in self._shared else self._measured(part))

    def _measured(self, part: Part) -> Noted:
        """A part of a parameter that has no other, while it is fresh."""
        part = part.formed() if isinstance(part, Outer | Convolution) else part
        if ghostly(part):
            return Noted(part, ghost_sums(part.left, part.right, self._grams))  # type: ignore[attr-defined]
        return Noted(part) if small(part) else Noted(part, squares=part.squares())

    def _finish(self, task: int) -> None:
        """Norms, factors and sums, when the backward pass has ended."""
        if task != self._task:
            return
        noted, self._noted = self._noted, {}
        self._drop()
        for name, p in self._frozen:
            if p.requires_grad:
                raise RuntimeError(
                    f"parameter {name!r} became trainable after gradients were taken over: call detach() and "
                    "attach() again"
                )
        size, *others = sizes = sorted({note.part.samples for notes in noted.values() for note in notes})
        if others:
            raise RuntimeError(
                f"layers have seen {sizes} samples: the first input of the model must tell how many"
            )
        home = next(iter(noted)).device
        with plainly(home):
            self._sum(noted, size, home)

    def _sum(self, noted: dict[Parameter, list[Noted]], size: int, home: torch.device) -> None:
        if all(p.grad is None for p in self._names):
            self._fresh()
        bound = self.sensitivity
        self._clipped_to.append(bound.clone() if isinstance(bound, Tensor) else bound)
        self._counted |= self._inputs
        owners, notes = self._grouped(noted)
        squares, errors = measured(notes, home)
        scale = size if self.loss_reduction == "mean" else 1
        squares = squares.clamp(min=0)
        upper, flat = squares + errors, self.clipping == "flat"
        upper = (upper.sum(0, keepdim=True) if flat else upper).sqrt() * (scale * SLACK)
        self.norms = squares.sum(0).sqrt() * scale
        finite = upper.isfinite().all(0)
        factors = (self._limits(owners, home, upper.dtype) / upper).clamp(max=1)
        factors = torch.where(finite, factors, 0.0)
        counts = self._count(home)
        counts += torch.stack(((factors < 1).any(0) & finite, ~finite)).sum(1)
        # Where all are finite, as almost always, nothing has to be selected.
        sees = home.type != "cuda" or not torch.cuda.is_current_stream_capturing()
        keep = None if sees and bool(finite.all()) else finite
        weights: dict[Any, Tensor] = {}
        noted.clear()
        notes.reverse()
        for i, params in enumerate(owners):
            note = notes.pop()  # what is summed is let go of
            row, device, dtype = 0 if flat else i, params[0].device, compute_dtype(params[0].dtype)
            if (row, device, dtype) not in weights:
                weights[row, device, dtype] = (factors[row] * scale).to(device, dtype)
            chosen = None if keep is None else keep.to(device)
            out = _summand(params[0]) if len(params) == 1 else None
            total = note.part.total(weights[row, device, dtype], chosen, out)
            sizes = note.part.sizes if isinstance(note.part, Stacked) else [total.numel()]
            del note
            for p, value in zip(params, total.split(sizes) if len(params) > 1 else [total], strict=True):
                _store(p, value.view(p.shape))
        self.samples += size

    def _grouped(self, noted: dict[Parameter, list[Noted]]) -> tuple[list[list[Parameter]], list[Noted]]:
        """All that is to be clipped, and whose it is: small parts of several parameters are one."""
        owners: list[list[Parameter]] = []
        notes: list[Noted] = []
        together: dict[Any, list[tuple[Parameter, Dense]]] = {}
        for p, uses in noted.items():
            note = (
                uses[0]
                if len(uses) == 1 and uses[0].part is not None
                else Noted(joined([u.part for u in uses]))
            )
            if self.clipping == "flat" and small(note.part):
                key = p.device, note.part.dtype, p.dtype
                together.setdefault(key, []).append((p, note.part))  # type: ignore[arg-type]
            else:
                owners.append([p])
                notes.append(note)
        for own in together.values():
            params, parts = zip(*own, strict=True)
            owners.append(list(params))
            notes.append(Noted(parts[0] if len(parts) == 1 else Stacked.of(parts)))
        return owners, notes

    def _limits(self, owners: list[list[Parameter]], home: torch.device, wide: torch.dtype) -> Tensor:
        bounds = self._bounds()
        if self.clipping == "per_layer":
            own = dict(zip(self._names, bounds, strict=True))
            bounds = [own[p] for (p,) in owners]
        if any(isinstance(bound, Tensor) for bound in bounds):
            limits = torch.stack([torch.as_tensor(bound).to(home, wide).reshape(()) for bound in bounds])
        else:
            limits = torch.tensor(bounds, dtype=wide, device=home)
        return limits.unsqueeze(1)

    def _drop(self) -> None:
        if self._task is not None or self._noted:
            self._task, self._noted = None, {}
            self._grams.forget()


def _summand(p: Parameter) -> Tensor | None:
    """The gradient that there is, if a sum can be added to it in place."""
    grad = p.grad
    fits = grad is not None and grad.dtype == compute_dtype(p.dtype) and grad.is_contiguous()
    return grad if fits else None


def _store(p: Parameter, value: Tensor) -> None:
    """Add to the gradient what was not added to it in place."""
    if p.grad is None:
        p.grad = value
    elif p.grad.dtype != value.dtype:
        p.grad = value + p.grad
    elif p.grad.data_ptr() != value.data_ptr():
        p.grad.add_(value)
