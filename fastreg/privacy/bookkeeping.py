"""Per-sample clipped gradients by one backward pass: the book-keeping of Bu et al. 2023.

    forward    every covered layer runs on detached weights and leaves a tap on its output
    backward   autograd computes gradients of activations alone; each tap notes what its layer was given and
               got (`layers.py`), as parts of per-sample gradients (`parts.py`), with their norms
    its end    norms are combined over layers, every sample gets its factor, every parameter its sum

Nothing is trained that is not clipped: parameters that no covered layer owns are refused by name, and so are
gradients that reach a covered parameter by another way.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from ..reference.step import compute_dtype, scalar_dtype
from .ghost import Grams
from .layers import Layer, Refused, layer_of
from .parts import Outer, Part, joined

Bound = float | Tensor

SLACK = 1 + 2**-21
"""What a norm is multiplied with before it is compared: factors are rounded to the precision of gradients."""


class BookKeeping:
    """Per-sample clipped gradients of a model by one backward pass.

    After `loss.backward()`, `p.grad` of every trainable parameter is the sum over the samples of their
    clipped gradients, divided by nothing, in float32 for 16-bit parameters too; further backward passes add
    to it.  `p.grad` is written when the backward pass ends.

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
        batch_dim: int = 0, attach: bool = True,
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
        self._within = 0
        self._task: int | None = None
        self._noted: dict[Parameter, list[tuple[Part, Any]]] = {}
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
        return math.hypot(*bounds)  # type: ignore[arg-type]

    def attach(self) -> None:
        """Take over the gradients of the model.

        Raises:
            ValueError: If a trainable parameter cannot be covered, by its name; nothing is attached then.
        """
        if self.attached:
            return
        names, layers = self._covered()
        self._bounds(len(names), list(names.values()))
        self._names = names
        self._frozen = [(n, p) for n, p in self.model.named_parameters() if p not in names]
        for module, (name, layer) in layers.items():
            module.forward = _Forward(self, name, layer)  # type: ignore[method-assign]
            self._undo.append(functools.partial(vars(module).pop, "forward"))
        for p, name in names.items():
            self._undo.append(p.register_hook(functools.partial(_refuse, name)).remove)
            if p.dtype.itemsize < 4:
                self._undo.append(functools.partial(setattr, p, "grad_dtype", p.grad_dtype))
                p.grad_dtype = torch.float32
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                self._undo.append(module.register_forward_pre_hook(_no_batch_statistics).remove)
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
        self._names, self._frozen, self._within = {}, [], 0
        self.reset()

    def reset(self) -> None:
        """Forget samples and unfinished passes; `p.grad` is left alone."""
        self.samples = 0
        self._drop()

    def _covered(self) -> tuple[dict[Parameter, str], dict[nn.Module, tuple[str, Layer]]]:
        """Trainable parameters and the layers that own them."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            raise ValueError("the model must not be wrapped in DistributedDataParallel: it sums unclipped gradients")
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
        if self._within == 0:
            self._batch = _batch_size((args, kwargs), self.batch_dim)
        self._within += 1

    def _leave(self, *_: Any) -> None:
        self._within = max(0, self._within - 1)

    def _run(self, forward: _Forward, x: Tensor) -> Tensor:
        """A layer, with a tap on its output."""
        layer, module = forward.layer, forward.layer.module
        if torch._C._current_graph_task_id() == -1:
            self._drop()  # what is left of a backward pass that failed
        needed = [name for name, p in module._parameters.items() if p is not None and p.requires_grad]
        params = [module._parameters[name] for name in needed]
        for name, p in zip(needed, params, strict=True):
            if p not in self._names:
                raise RuntimeError(
                    f"parameter {name!r} of {forward.name!r} is not the one that was there when gradients were "
                    "taken over: call detach() and attach() again"
                )
        x = self._with_samples(forward, x)
        first = x.movedim(self.batch_dim, 0)
        out, kept = layer.run(first if self.batch_dim else x)
        out = _Tap.apply(out, (self, layer, needed, torch._C._current_graph_task_id()), len(kept), *(t.detach() for t in kept), *params)
        return out.movedim(0, self.batch_dim) if self.batch_dim else out

    def _with_samples(self, forward: _Forward, x: Tensor) -> Tensor:
        """The input with all samples: one that is the same for all of them is expanded."""
        recomputed = not self._within and torch._C._current_graph_task_id() != -1
        size, dim = self._batch, self.batch_dim
        if size is None or not (self._within or recomputed):
            return x
        own = x.shape[dim] if x.dim() > dim else None
        positions = x.dim() == 1 and not x.is_floating_point()
        if own == size and not (positions and size > 1 and _counts_up(x)):
            return x
        if own == 1 and x.dim() > 1:
            return x.expand(*x.shape[:dim], size, *x.shape[dim + 1 :])
        if positions:
            return x.unsqueeze(dim).expand(size, -1) if dim == 0 else x.unsqueeze(dim).expand(-1, size)
        raise ValueError(
            f"the input {list(x.shape)} of {forward.name!r} should have the {size} samples of the batch in "
            f"dimension {dim}; freeze the layer, or let it keep samples apart"
        )

    # Backward

    def _note(self, layer: Layer, kept: Sequence[Tensor], grad: Tensor, needed: list[str], inside: int) -> None:
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
                raise RuntimeError("another backward pass did not end: call zero_grad() and reset(), and start anew")
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._finish, task))
        with _plainly(grad.device):
            for name, part in layer.parts(kept, grad, needed).items():
                p = layer.module._parameters[name]
                squares = None
                known = self._noted.setdefault(p, [])
                if known:
                    self._shared.add(p)
                if p not in self._shared:
                    part = part.formed() if hasattr(part, "formed") else part
                    squares = part.squares(self._grams) if isinstance(part, Outer) else part.squares()
                known.append((part, squares))

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
        sizes = {part.samples for parts in noted.values() for part, _ in parts}
        if len(sizes) > 1:
            raise RuntimeError(
                f"layers have seen {sorted(sizes)} samples: the first input of the model must tell how many"
            )
        (size,) = sizes
        home = next(iter(noted)).device
        with _plainly(home):
            self._sum(noted, size, home)

    def _sum(self, noted: dict[Parameter, list[tuple[Part, Any]]], size: int, home: torch.device) -> None:
        if all(p.grad is None for p in self._names):
            self.samples = 0
        parts, squares, errors = {}, [], []
        for p, uses in noted.items():
            part = parts[p] = joined([part for part, _ in uses])
            found, error = uses[0][1] if len(uses) == 1 and uses[0][1] is not None else part.squares()
            squares.append(found.clamp(min=0).to(home, non_blocking=True))
            errors.append(error.to(home, non_blocking=True))
        wide = scalar_dtype(home)
        scale = size if self.loss_reduction == "mean" else 1
        by_layer = torch.stack(squares)  # [parameters, samples]
        upper = by_layer + torch.stack(errors)
        flat = self.clipping == "flat"
        upper = (upper.sum(0, keepdim=True) if flat else upper).sqrt() * (scale * SLACK)
        self.norms = by_layer.sum(0).sqrt() * scale
        finite = upper.isfinite().all(0)
        limits = self._limits(list(noted), home, wide)
        factors = (limits / upper).clamp(max=1)
        factors = torch.where(finite, factors, 0.0)
        counts = self._count(home)
        counts += torch.stack(((factors < 1).any(0) & finite, ~finite)).sum(1)
        # Where all are finite, as almost always, nothing has to be selected.
        sees = home.type != "cuda" or not torch.cuda.is_current_stream_capturing()
        keep = None if sees and bool(finite.all()) else finite
        for i, (p, part) in enumerate(parts.items()):
            weights = (factors[0 if flat else i] * scale).to(p.device, compute_dtype(p.dtype))
            value = part.total(weights, None if keep is None else keep.to(p.device), _summand(p))
            if p.grad is None or p.grad.dtype != value.dtype:
                p.grad = value if p.grad is None else value + p.grad
            elif value is not p.grad:
                p.grad.add_(value)
        self.samples += size

    def _limits(self, order: list[Parameter], home: torch.device, wide: torch.dtype) -> Tensor:
        bounds = self._bounds()
        if self.clipping == "per_layer":
            own = dict(zip(self._names, bounds, strict=True))
            bounds = [own[p] for p in order]
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


class _Forward:
    """Stands in the place of a layer's `forward`.  Copies and pickles of the model get their own back."""

    def __init__(self, engine: BookKeeping, name: str, layer: Layer) -> None:
        self.engine, self.name, self.layer = engine, name, layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.layer.module
        if not torch.is_grad_enabled() or not any(
            p is not None and p.requires_grad for p in module._parameters.values()
        ):
            return type(module).forward(module, *args, **kwargs)
        if torch.compiler.is_compiling():
            raise RuntimeError("fastreg.privacy.BookKeeping does not work within torch.compile: run the model as it is")
        inputs = (*args, *kwargs.values())
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise TypeError(f"{self.name!r} must be called with one tensor, got {len(inputs)} arguments")
        return self.engine._run(self, inputs[0])

    def __reduce__(self) -> Any:
        return getattr, (self.layer.module, "forward")


class _Tap(torch.autograd.Function):
    """Lets a tensor through and hands its gradient to the engine; parameters are inputs that get nothing."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, use: Any, kept: int, *others: Tensor) -> Tensor:
        ctx.mark_dirty(out)  # not a new tensor: a view could not be changed in place
        ctx.use = use
        ctx.save_for_backward(*others[:kept])
        ctx.kept = kept
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        engine, layer, needed, inside = ctx.use
        nodes = ctx.next_functions[-len(needed) :]
        try:
            asked = [torch._C._will_engine_execute_node(node) for node, _ in nodes]
        except RuntimeError as error:
            raise RuntimeError(
                "torch.autograd.grad cannot ask for gradients of parameters whose gradients are clipped: call backward()"
            ) from error
        wanted = [name for name, is_asked in zip(needed, asked, strict=True) if is_asked]
        if wanted:
            if torch.is_grad_enabled():
                raise RuntimeError("create_graph=True: gradients of per-sample clipped gradients are not known")
            engine._note(layer, ctx.saved_tensors, grad, wanted, inside)
        return grad, None, None, *[None] * (ctx.kept + len(needed))


def _refuse(name: str, grad: Tensor | None) -> None:
    """Called with what autograd itself has for a covered parameter."""
    if grad is not None:
        raise RuntimeError(
            f"parameter {name!r} got a gradient that is not clipped: its weight is used outside of its layer"
        )


def _no_batch_statistics(module: nn.Module, _: Any) -> None:
    if module.training and torch.is_grad_enabled():
        raise RuntimeError(f"{type(module).__name__} in training mixes samples: call its eval(), or use GroupNorm")


def _batch_size(inputs: Any, dim: int) -> int | None:
    """How many samples the first tensor has that may have several."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    sizes = [leaf.shape[dim] for leaf in leaves if leaf.dim() > dim]
    return next((size for size in sizes if size != 1), 1 if sizes else None)


def _counts_up(x: Tensor) -> bool:
    """Whether these are positions, the same for all samples, of which there happen to be as many."""
    return bool(torch.equal(x - x[:1], torch.arange(len(x), device=x.device, dtype=x.dtype)))


@contextlib.contextmanager
def _plainly(device: torch.device) -> Iterator[None]:
    """Within the block nothing is recorded, and products are as precise as their factors."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
    former = [place.fp32_precision for place in backends]  # type: ignore[attr-defined]
    narrow = [(place, value) for place, value in zip(backends, former, strict=True) if value != "ieee"]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for place, _ in narrow:
            place.fp32_precision = "ieee"  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for place, value in narrow:
                place.fp32_precision = value  # type: ignore[attr-defined]
