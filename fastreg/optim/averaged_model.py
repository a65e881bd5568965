"""A model of averaged weights beside the trained one: torch's `AveragedModel`, in one pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from ..common.validation import check_range
from ..engine import layout
from ..reference.step import compute_dtype
from .fsdp import abandon_forward, fsdp_modules, reshard
from .model_average import UpdateAverages, local_part
from .tensor_tree import TensorTree, first_names, named_tensors, unsaved_buffers

NARROW = (torch.bfloat16, torch.float16)
AVERAGED = (*NARROW, torch.float32, torch.float64, torch.complex64, torch.complex128)
"""Tensors of other dtypes are copied."""

AvgFn = Callable[[Tensor, Tensor, Any], Tensor]
MultiAvgFn = Callable[[Any, Any, Any], None]


class ExponentialAverage:
    """An exponential moving average, as an update for `AveragedModel`.

    average ← average + (1 - decay)(p - average)

    It can be pickled, and also be passed to torch's `AveragedModel`.

    Args:
        decay: Share of the average that is kept at each update; 0 ≤ decay ≤ 1.

    Raises:
        ValueError: For a decay out of range.

    Reference:
        Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging".
    """

    def __init__(self, decay: float = 0.999) -> None:
        self.decay = check_range("decay", decay, 0, 1)

    def __call__(self, averages: Sequence[Tensor], weights: Sequence[Tensor], n_averaged: Any) -> None:
        """Updates averages of one device and dtype in place, as torch's function does."""
        swa_utils.get_ema_multi_avg_fn(self.decay)(list(averages), list(weights), n_averaged)

    def __repr__(self) -> str:
        return f"get_ema_multi_avg_fn({self.decay!r})"


get_ema_multi_avg_fn = ExponentialAverage  # as torch calls the function that makes one


class _Entry(NamedTuple):
    """A parameter or buffer: its average, the narrow copy of that, and whether it is averaged or copied."""

    average: Tensor
    rounded: Tensor | None
    averaged: bool


class AveragedModel(swa_utils.AveragedModel):
    """A model of averaged weights: all of equal weight (SWA), or by an update of yours.

    A drop-in for `torch.optim.swa_utils.AveragedModel`: an update with equal weights, or with
    `fastreg.get_ema_multi_avg_fn`, is one pass over memory.  Averages of bfloat16 and float16 weights are
    kept in `.averages`, in float32, so that they do not stall; `.module` keeps the dtypes of the model and
    has them rounded.  Without `averages` in a state dict, as saved by torch, averages start from `module`.
    Parameters and buffers that are not floating point are copied.

    A model sharded by FSDP2 (`fully_shard`) cannot be copied.  `.module` is then the model itself, averages
    are shards in `.averages`, and a call runs the model with averages instead of its weights, without
    gradients; afterwards it has its weights again, bit for bit.

    The first update copies the weights.

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
        sharded = bool(fsdp_modules(model))
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
        self.averages = TensorTree()
        self._build()

    # Updates --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Updates the averages by the weights of the model.

        Raises:
            RuntimeError: While averages are swapped in.
            ValueError: If parameters and buffers of the model have other shapes than the averages.
        """
        if self._inside:
            raise RuntimeError("update_parameters() while averages are swapped in would average them again")
        reshard(model)
        if self._key != self._current_key():
            self._build()
        new = [*model.parameters(), *model.buffers()]
        self._check(new)
        pairs = [(entry, weight.detach()) for entry, weight in zip(self._entries, new, strict=True)]
        weights = [_like(entry.average, weight) for entry, weight in pairs if entry.averaged]
        done = int(self.n_averaged)
        if self.avg_fn is None and self.multi_avg_fn is None:
            self._update.run(weights, 1 / (done + 1), done)
        elif isinstance(self.multi_avg_fn, ExponentialAverage):
            self._update.run(weights, 1 - self.multi_avg_fn.decay if done else 1.0, done)
        else:
            self._call(weights, copy=not done)
            self._update.round()
        for entry, weight in pairs:
            if not entry.averaged:
                entry.average.copy_(weight)
        self.n_averaged += 1

    def _call(self, weights: list[Tensor], copy: bool) -> None:
        """Calls the user's function with averages and weights, as torch would."""
        groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        averages = (local_part(entry.average.detach()) for entry in self._entries if entry.averaged)
        for average, weight in zip(averages, weights, strict=True):
            weight = local_part(weight).to(average.dtype)
            if copy:
                average.copy_(weight)
            elif self.avg_fn is not None:
                average.copy_(self.avg_fn(average, weight, self.n_averaged.to(average.device)))
            else:
                group = groups.setdefault((average.device, average.dtype), ([], []))
                group[0].append(average)
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
        for weight, (average, _, _) in zip(new, self._entries, strict=True):
            if weight.shape != average.shape or weight.is_complex() != average.is_complex():
                raise ValueError(
                    f"the model has {tuple(weight.shape)}, {weight.dtype} where its average has "
                    f"{tuple(average.shape)}, {average.dtype}; "
                    "pass the model that AveragedModel was made from"
                )
            if layout.is_dtensor(weight) != layout.is_dtensor(average):
                raise ValueError(
                    f"the model has a {type(weight.data).__name__} where its average is a "
                    f"{type(average.data).__name__}; shard the model first, then make the AveragedModel"
                )

    # Where averages are ---------------------------------------------------------------------------------

    @torch.no_grad()
    def _build(self, precise: dict[str, Tensor] | None = None) -> None:
        """Finds the averages, and makes those that are missing beside the module.

        `precise` are averages that the module held before it was cast to something narrower.
        """
        if self._inside:
            return
        reshard(self.module)
        parameters = dict(self.module.named_parameters())
        unsaved = unsaved_buffers(self.module)
        prev, self.averages = dict(self.averages.named_buffers()), TensorTree()
        self._entries, self._key = [], self._current_key()
        for name, live in (*parameters.items(), *self.module.named_buffers()):
            averaged = live.dtype in AVERAGED and (self.use_buffers or name in parameters)
            narrow, average = averaged and live.dtype in NARROW, prev.get(name)
            if not (self._sharded or narrow):
                if average is not None:  # the module has been cast to something wider
                    live.copy_(average)
                self._entries.append(_Entry(live, None, averaged))
                continue
            average = (precise or {}).get(name) if average is None else average
            dtype = compute_dtype(live.dtype) if narrow else live.dtype
            if average is None or average.dtype != dtype or average.device != live.device:
                average = (live if average is None else average).detach().to(live.device, dtype, copy=True)
            self.averages.put(name, average, name not in unsaved)
            self._entries.append(_Entry(average, None if self._sharded else live.detach(), averaged))
        first = first_names(self.module)
        beside = dict(self.averages.named_buffers())
        self._aliases = {
            alias: first[id(live)] for alias, live in named_tensors(self.module) if first[id(live)] in beside
        }
        entries = [entry for entry in self._entries if entry.averaged]
        self._update = UpdateAverages([e.average for e in entries], [e.rounded for e in entries])

    def _current_key(self) -> list[Any]:
        tensors = (*self.module.parameters(), *self.module.buffers())
        return [(id(t), t.dtype, local_part(t).data_ptr()) for t in tensors]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AveragedModel:
        precise = {name: tensor.detach() for name, tensor in named_tensors(self.module)}
        super()._apply(fn, recurse)
        self._build(precise)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Returns what copies and pickles keep; the update of averages is built again."""
        return {**self.__dict__, "_key": None, "_entries": [], "_update": None}

    # Sharded models -------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module with the averages; a sharded one without gradients."""
        if not self._sharded:
            return self.module(*args, **kwargs)
        with torch.no_grad(), self.swapped_in():
            return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Lets `.module` hold the averages in a block, also if it is a sharded model that is trained.

        Afterwards it holds its weights again, bit for bit, and its buffers.
        """
        if not self._sharded or self._inside:
            yield
            return
        if self._key != self._current_key():
            self._build()
        reshard(self.module)
        beside = dict(self.averages.named_buffers())
        names = first_names(self.module)
        weights = [(local_part(p.detach()), local_part(beside[n])) for n, p in self.module.named_parameters()]
        trained = [weight.clone() for weight, _ in weights]
        buffers = [
            (owner, name, live, names[id(live)])
            for owner in self.module.modules()
            for name, live in owner._buffers.items()
            if live is not None
        ]
        self._inside = True
        try:
            with torch.no_grad():
                for weight, average in weights:
                    weight.copy_(average)
            # Buffers are exchanged, not copied: a forward pass may write them, or replace them.
            for owner, name, _, path in buffers:
                owner._buffers[name] = beside[path]
            yield
        except BaseException:
            abandon_forward(self.module)
            raise
        finally:
            reshard(self.module)  # or the next forward pass would find the averages already gathered
            with torch.no_grad():
                for (weight, _), kept in zip(weights, trained, strict=True):
                    weight.copy_(kept)
            for owner, name, live, path in buffers:
                if (written := owner._buffers[name]) is not None and written is not beside[path]:
                    self.averages.put(path, written)
                owner._buffers[name] = live
            self._inside = False

    # Checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns torch's dictionary, with the float32 averages of narrower weights under `averages`.

        That of a sharded model has the averages under the names of the weights of the module.
        """
        out = super().state_dict(*args, **kwargs)
        if not self._sharded:
            return out
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        beside, live = dict(self.averages.named_buffers()), dict(named_tensors(self.module))
        for alias, name in self._aliases.items():
            if f"{prefix}module.{alias}" in out:
                out[f"{prefix}module.{alias}"] = beside[name].to(live[alias].dtype)
            if beside[name].dtype == live[alias].dtype:
                out.pop(f"{prefix}averages.{name}", None)
        return out

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        module, averages = f"{prefix}module.", f"{prefix}averages."
        beside, live = dict(self.averages.named_buffers()), dict(named_tensors(self.module))
        for key in [key for key in state_dict if key.startswith(averages)]:
            if (name := key.removeprefix(averages)) not in beside:  # the saved module was narrower
                value, tensor = state_dict.pop(key), live.get(name)
                for alias in [other for other in live if live[other] is tensor] or [name]:
                    state_dict[module + alias] = value
        for alias, name in self._aliases.items():
            if (saved := state_dict.get(module + alias)) is None:
                continue
            if averages + name not in state_dict:
                state_dict[averages + name] = saved.to(beside[name].dtype, copy=True)
            if self._sharded:  # the trained weights stay as they are
                state_dict[module + alias] = live[alias].detach()
        super()._load_from_state_dict(state_dict, prefix, *args)


def _like(average: Tensor, weight: Tensor) -> Tensor:
    """The weight on the device of its average, and sharded alike."""
    if layout.is_dtensor(average) and weight.placements != average.placements:  # type: ignore[attr-defined]
        weight = weight.redistribute(placements=average.placements)  # type: ignore[attr-defined]
    return weight if weight.device == average.device else weight.to(average.device)
