"""A model of averaged weights beside the one that is trained: torch's `AveragedModel`, in one pass.

Where an average is held:

    float32, float64, complex   in the parameter of `.module`
    bfloat16, float16           in `.averages`, float32; `.module` has it rounded
    FSDP2                       in `.averages`, as shards; `.module` is the trained model
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from ..engine import layout
from ..reference.step import compute_dtype
from .model_average import Averaging, local_part

NARROW = (torch.bfloat16, torch.float16)
AVERAGED = (*NARROW, torch.float32, torch.float64, torch.complex64, torch.complex128)
"""Tensors of other dtypes are copied."""

AvgFn = Callable[[Tensor, Tensor, Any], Tensor]
MultiAvgFn = Callable[[Any, Any, Any], None]


class ExponentialAverage:
    """What `get_ema_multi_avg_fn` returns.

    Args:
        decay: Share of the average that is kept at each update; 0 ≤ decay ≤ 1.

    Raises:
        ValueError: For a decay out of range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay=}")
        self.decay = float(decay)

    def __call__(self, averages: Sequence[Tensor], weights: Sequence[Tensor], n_averaged: Any) -> None:
        """Update averages in place, as torch's function does; `AveragedModel` has a faster way.

        Args:
            averages: Of one device and dtype.
            weights: Tensors of the same shapes, device and dtype.
            n_averaged: Not used.
        """
        swa_utils.get_ema_multi_avg_fn(self.decay)(list(averages), list(weights), n_averaged)

    def __repr__(self) -> str:
        return f"get_ema_multi_avg_fn({self.decay!r})"


def get_ema_multi_avg_fn(decay: float = 0.999) -> ExponentialAverage:
    """An exponential moving average for `AveragedModel`: average ← average + (1 - decay)(p - average).

    It can be pickled, and given to torch's `AveragedModel` as well.

    Args:
        decay: Share of the average that is kept at each update; 0 ≤ decay ≤ 1.

    Raises:
        ValueError: For a decay out of range.

    Reference:
        Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging".
    """
    return ExponentialAverage(decay)


class _Entry(NamedTuple):
    """A parameter or buffer: where its average is, where that is rounded to, and whether it is one."""

    own: Tensor
    rounded: Tensor | None
    averaged: bool


class _Tree(nn.Module):
    """Tensors under the names that they have in a model; casts leave their dtypes alone."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Tree:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class AveragedModel(swa_utils.AveragedModel):
    """Averages of the weights of a model, of equal weight (SWA) unless told otherwise.

    A drop-in for `torch.optim.swa_utils.AveragedModel`: an update with equal weights, or with
    `fastreg.get_ema_multi_avg_fn`, is one pass over memory.  Averages of bfloat16 and float16 weights are
    held in float32, so that they do not stall; `.module` keeps the dtypes of the model and holds them
    rounded.  The state dict has the float32 averages under `averages`; without them, as saved by torch,
    averages start from `module`.  Parameters and buffers that are not floating point are copied.

    A model sharded by FSDP2 (`fully_shard`) cannot be copied.  `.module` is then the given model, averages
    are kept as shards, and a call runs the model with averages in place of its weights, without gradients;
    afterwards it has its weights again, bit for bit.

    The first update copies.

    Args:
        model: The model that is trained; shard it first.
        device: Where to keep the averages; by default where the model is.
        avg_fn: `(average, weight, n_averaged) -> average`, for one tensor.
        multi_avg_fn: `(averages, weights, n_averaged)`, for lists of tensors of one device and dtype; updates
            in place.
        use_buffers: Average buffers as well, instead of copying them.

    Raises:
        TypeError: If the model is no module, or a function cannot be called.
        ValueError: If both functions are given, or a device for a sharded model.

    Reference:
        Izmailov et al. 2018, "Averaging weights leads to wider optima and better generalization".
    """

    def __init__(
        self, model: nn.Module, device: int | str | torch.device | None = None, avg_fn: AvgFn | None = None,
        multi_avg_fn: MultiAvgFn | None = None, use_buffers: bool = False,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
        for name, function in (("avg_fn", avg_fn), ("multi_avg_fn", multi_avg_fn)):
            if function is not None and not callable(function):
                raise TypeError(
                    f"{name} must be callable such as get_ema_multi_avg_fn(0.999), got {function!r}"
                )
        if avg_fn is not None and multi_avg_fn is not None:
            raise ValueError(
                f"only one of avg_fn and multi_avg_fn may be given, got {avg_fn=}, {multi_avg_fn=}"
            )
        sharded = bool(_fsdp_modules(model))
        if sharded and device is not None:
            raise ValueError(
                f"averages of a model sharded by FSDP2 stay where its shards are, got {device=}; leave it out"
            )
        if sharded:
            nn.Module.__init__(self)
            self.module, self.avg_fn, self.multi_avg_fn = model, avg_fn, multi_avg_fn
            self.use_buffers = use_buffers
            self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long))
        else:
            super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers)  # type: ignore[arg-type]
        self._sharded, self._inside = sharded, False
        self.averages = _Tree()
        self._build()

    # Updates --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights of the model into the averages.

        Args:
            model: The model that is trained; its parameters and buffers have the shapes of the averages.

        Raises:
            RuntimeError: While averages are swapped in.
            ValueError: If the model does not fit.
        """
        if self._inside:
            raise RuntimeError("update_parameters() while averages are swapped in would average them again")
        _reshard(model)
        if self._key != self._current_key():
            self._build()
        new = [*model.parameters(), *model.buffers()]
        self._check(new)
        pairs = [(entry, weight.detach()) for entry, weight in zip(self._entries, new, strict=True)]
        weights = [_weight(entry.own, weight) for entry, weight in pairs if entry.averaged]
        done = int(self.n_averaged)
        if self.avg_fn is None and self.multi_avg_fn is None:
            self._averaging.run(weights, 1 / (done + 1), done)
        elif isinstance(self.multi_avg_fn, ExponentialAverage):
            self._averaging.run(weights, 1 - self.multi_avg_fn.decay if done else 1.0, done)
        else:
            self._call(weights, copy=not done)
            self._averaging.round()
        for entry, weight in pairs:
            if not entry.averaged:
                entry.own.copy_(weight)
        self.n_averaged += 1

    def _call(self, weights: list[Tensor], copy: bool) -> None:
        """What the user's function makes of averages and weights, as torch would call it."""
        groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        owners = (local_part(entry.own.detach()) for entry in self._entries if entry.averaged)
        for own, weight in zip(owners, weights, strict=True):
            weight = local_part(weight).to(own.dtype)
            if copy:
                own.copy_(weight)
            elif self.avg_fn is not None:
                own.copy_(self.avg_fn(own, weight, self.n_averaged.to(own.device)))
            else:
                group = groups.setdefault((own.device, own.dtype), ([], []))
                group[0].append(own)
                group[1].append(weight)
        if self.multi_avg_fn is not None:
            for (device, _), group in groups.items():
                self.multi_avg_fn(*group, self.n_averaged.to(device))

    def _check(self, new: list[Tensor]) -> None:
        if len(new) != len(self._entries):
            raise ValueError(
                f"the model has {len(new)} parameters and buffers, its averages {len(self._entries)}; "
                "pass the model that AveragedModel was made from"
            )
        for weight, (own, _, _) in zip(new, self._entries, strict=True):
            if weight.shape != own.shape or weight.is_complex() != own.is_complex():
                raise ValueError(
                    f"the model has {tuple(weight.shape)}, {weight.dtype} where its average has "
                    f"{tuple(own.shape)}, {own.dtype}; pass the model that AveragedModel was made from"
                )
            if layout.is_dtensor(weight) != layout.is_dtensor(own):
                raise ValueError(
                    f"the model has a {type(weight.data).__name__} where its average is a "
                    f"{type(own.data).__name__}; shard the model first, then make the AveragedModel"
                )

    # Where averages are ---------------------------------------------------------------------------------

    @torch.no_grad()
    def _build(self, precise: dict[str, Tensor] | None = None) -> None:
        """Find out where averages are, and make what is missing beside the module.

        Args:
            precise: Averages that the module held before it was cast to something narrower.
        """
        if self._inside:
            return
        _reshard(self.module)
        parameters = dict(self.module.named_parameters())
        volatile = _volatile(self.module)
        former, self.averages = dict(self.averages.named_buffers()), _Tree()
        self._entries, self._key = [], self._current_key()
        for name, live in (*parameters.items(), *self.module.named_buffers()):
            averaged = live.dtype in AVERAGED and (self.use_buffers or name in parameters)
            narrow, own = averaged and live.dtype in NARROW, former.get(name)
            if not (self._sharded or narrow):
                if own is not None:  # the module has been cast to something wider
                    live.copy_(own)
                self._entries.append(_Entry(live, None, averaged))
                continue
            own = (precise or {}).get(name) if own is None else own
            dtype = compute_dtype(live.dtype) if narrow else live.dtype
            if own is None or own.dtype != dtype or own.device != live.device:
                own = (live if own is None else own).detach().to(live.device, dtype, copy=True)
            _put(self.averages, name, own, name not in volatile)
            self._entries.append(_Entry(own, None if self._sharded else live.detach(), averaged))
        first = {id(live): name for name, live in reversed(_names(self.module))}
        beside = dict(self.averages.named_buffers())
        self._aliases = {
            alias: first[id(live)] for alias, live in _names(self.module) if first[id(live)] in beside
        }
        averaged_ones = [entry for entry in self._entries if entry.averaged]
        self._averaging = Averaging([e.own for e in averaged_ones], [e.rounded for e in averaged_ones])

    def _current_key(self) -> list[Any]:
        tensors = (*self.module.parameters(), *self.module.buffers())
        return [(id(t), t.dtype, local_part(t).data_ptr()) for t in tensors]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AveragedModel:
        precise = {name: tensor.detach() for name, tensor in _names(self.module)}
        super()._apply(fn, recurse)
        self._build(precise)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """The pass is made anew."""
        return {**self.__dict__, "_key": None, "_entries": [], "_averaging": None}

    # Sharded models -------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the averages; a sharded one without gradients."""
        if not self._sharded:
            return self.module(*args, **kwargs)
        with torch.no_grad(), self.swapped_in():
            return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the block `.module` holds the averages, also if it is a sharded model that is trained.

        Afterwards that one holds its weights again, bit for bit, and its buffers.
        """
        if not self._sharded or self._inside:
            yield
            return
        if self._key != self._current_key():
            self._build()
        _reshard(self.module)
        beside = dict(self.averages.named_buffers())
        names = {id(live): name for name, live in reversed(_names(self.module))}
        weights = [(local_part(p.detach()), local_part(beside[n])) for n, p in self.module.named_parameters()]
        trained = [weight.clone() for weight, _ in weights]
        buffers = [
            (holder, name, live, names[id(live)])
            for holder in self.module.modules()
            for name, live in holder._buffers.items()
            if live is not None
        ]
        self._inside = True
        try:
            with torch.no_grad():
                for weight, average in weights:
                    weight.copy_(average)
            # Buffers change places: a forward pass may write them, or replace them.
            for holder, name, _, whole in buffers:
                holder._buffers[name] = beside[whole]
            yield
        except BaseException:
            _abandon(self.module)
            raise
        finally:
            _reshard(self.module)  # or the next forward pass would find the averages already gathered
            with torch.no_grad():
                for (weight, _), kept in zip(weights, trained, strict=True):
                    weight.copy_(kept)
            for holder, name, live, whole in buffers:
                if (own := holder._buffers[name]) is not None and own is not beside[whole]:
                    _put(self.averages, whole, own)
                holder._buffers[name] = live
            self._inside = False

    # Checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's, with the float32 averages of narrower weights under `averages`.

        That of a sharded model has the averages where the weights of the module would be.
        """
        out = super().state_dict(*args, **kwargs)
        if not self._sharded:
            return out
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        beside, live = dict(self.averages.named_buffers()), dict(_names(self.module))
        for alias, name in self._aliases.items():
            if f"{prefix}module.{alias}" in out:
                out[f"{prefix}module.{alias}"] = beside[name].to(live[alias].dtype)
            if beside[name].dtype == live[alias].dtype:
                out.pop(f"{prefix}averages.{name}", None)
        return out

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        module, averages = f"{prefix}module.", f"{prefix}averages."
        beside, live = dict(self.averages.named_buffers()), dict(_names(self.module))
        for key in [key for key in state_dict if key.startswith(averages)]:
            if (name := key.removeprefix(averages)) not in beside:  # what was saved is narrower
                value = state_dict.pop(key)
                for alias in _aliases(name, live):
                    state_dict[module + alias] = value
        for alias, name in self._aliases.items():
            if (given := state_dict.get(module + alias)) is None:
                continue
            if averages + name not in state_dict:
                state_dict[averages + name] = given.to(beside[name].dtype, copy=True)
            if self._sharded:  # what is trained stays as it is
                state_dict[module + alias] = live[alias].detach()
        super()._load_from_state_dict(state_dict, prefix, *args)


def _names(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Every name of every parameter and buffer."""
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def _aliases(name: str, tensors: dict[str, Tensor]) -> list[str]:
    """All names of a tensor."""
    return [other for other in tensors if tensors[other] is tensors.get(name)] or [name]


def _volatile(module: nn.Module) -> set[str]:
    """The names of the buffers that are not saved."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, holder in module.named_modules()
        for name in holder._non_persistent_buffers_set
    }


def _put(tree: nn.Module, name: str, tensor: Tensor, persistent: bool | None = None) -> None:
    """Hold a tensor under a name; by default it is saved if the former one is."""
    *path, last = name.split(".")
    for part in path:
        if part not in tree._modules:
            tree.add_module(part, _Tree())
        tree = tree.get_submodule(part)
    if persistent is None:
        tree._buffers[last] = tensor
    else:
        tree.register_buffer(last, tensor, persistent)


def _weight(own: Tensor, weight: Tensor) -> Tensor:
    """The weight on the device of its average, placed alike."""
    if layout.is_dtensor(own) and weight.placements != own.placements:  # type: ignore[attr-defined]
        weight = weight.redistribute(placements=own.placements)  # type: ignore[attr-defined]
    return weight if weight.device == own.device else weight.to(own.device)


def _fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 shards; it is not imported for those who do not use it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return (
        [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    )


def _abandon(model: nn.Module) -> None:
    """Bring FSDP2 out of a forward pass that failed, in which it would hold on to what it has gathered."""
    for module in _fsdp_modules(model):
        if hasattr(module, "reset_iter_state"):
            with contextlib.suppress(RuntimeError):  # only the outermost may
                module.reset_iter_state()
        else:  # before torch 2.13
            state = module._get_fsdp_state()
            group, idle = state._fsdp_param_group, type(state._training_state).IDLE
            state._training_state, state._state_ctx.iter_forward_root = idle, None
            if group is not None:
                group._training_state = idle


def _reshard(model: nn.Module) -> None:
    """Let parameters be shards, as they are not between a forward and a backward pass."""
    for module in _fsdp_modules(model):
        module.reshard()
