"""The step engine: an optimizer is a list of pieces, run in one pass over memory.

    pieces ──stage──▶ chain            one per parameter group
    parameters with gradients ──▶ batches, one per (device, dtypes, chain, sharding)
    pieces.prepare(batches)            reductions, such as the gradient norm, into device scalars
    multi_tensor.run(batch)            read weight, gradient and state once; write weight and state once

What a step shares with the last one is kept in buckets, which are made anew as soon as any parameter,
state tensor, dtype, chain or backend differs.  Buckets hold addresses, not state: state may be replaced
or moved off the device between steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import compress
from operator import attrgetter, eq, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from .. import backend, multi_tensor, random
from ..chain import PLAIN, Buffer, Chain
from ..multi_tensor import Batch, Table
from ..reference.step import compute_dtype
from . import placement
from .piece import Piece
from .regularizers import EMA, ClipNorm
from .rules import Descend

_kind = attrgetter("dtype", "layout")

_NOT_YET = ("amsgrad", "maximize", "capturable", "differentiable")
"""Options of torch's optimizers that would change the result and are not supported."""


@dataclass
class Bucket:
    """Parameters that share device, dtypes, chain and sharding: lists of equal length."""

    chain: Chain
    shards: placement.Shards | None
    positions: list[int] = field(default_factory=list)  # among the parameters of this step
    firsts: list[int] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    layouts: list[tuple[int, ...]] = field(default_factory=list)
    places: list[tuple[list[int], list[int]]] = field(default_factory=list)  # for each buffer
    plain: bool = True  # no DTensors, all contiguous
    table: Table = field(default_factory=Table)

    def gather(self, states: list[dict[str, Any]]) -> list[list[Tensor]]:
        """For each buffer of the chain, the local tensors; a missing one is a `KeyError`."""
        own = [states[i] for i in self.positions]
        buffers = [list(map(itemgetter(buffer.name), own)) for buffer in self.chain.buffers]
        return buffers if self.plain else [list(map(placement.local, buffer)) for buffer in buffers]


class Engine(torch.optim.Optimizer):
    """Base of the optimizers: composes pieces into chains and runs them.

    A subclass also derives from the torch optimizer it stands in for, and calls `_compose` before the
    constructor of that one, which checks the arguments and makes the parameter groups.
    """

    def _compose(self, pieces: Iterable[Piece], regularizers: Iterable[Piece], seed: int | None) -> None:
        regularizers = tuple(regularizers)
        for piece in regularizers:
            if not isinstance(piece, Piece):
                raise TypeError(f"regularizers must be pieces such as fastreg.ClipNorm(1.0), got {piece!r}")
        names = [piece.name if isinstance(piece, EMA) else type(piece).__name__ for piece in regularizers]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"{name!r} is given more than once; several EMAs need names: EMA(decay, name=...)"
                )
        self._pieces = tuple(sorted((*pieces, *regularizers, Descend()), key=attrgetter("phase")))
        self._seed = random.instance_seed() if seed is None else seed
        random.key(self._seed, random.Purpose.INSTANCE)  # refuses a seed that does not fit
        self._forget()
        self._swapped = False

    def _forget(self) -> None:
        self._key: Any = None
        self._buckets: list[Bucket] = []
        self._steps: list[Tensor] = []
        self._counts = torch.zeros(0, device="cpu")

    # The step -------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # `torch.compiler.disable` would import Dynamo, and triton with it
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one optimization step; parameters without a gradient are left alone.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What the closure returns, `None` without one.

        Raises:
            RuntimeError: Inside `averaged()`, and for sparse gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_inside("step()", "train the averaged weights")
        work = self._work()
        if not work:
            return loss
        for piece in self._pieces:
            piece.prepare(work)
        for batch, _ in work:
            batch.skip = self._skip(batch.device)
            multi_tensor.run(batch)
        self._counts.add_(1)
        return loss

    def _refuse_inside(self, what: str, consequence: str) -> None:
        if self._swapped:
            raise RuntimeError(f"{what} inside `with optimizer.averaged():` would {consequence}")

    def _skip(self, device: torch.device) -> Tensor | None:
        flags = [flag for piece in self._pieces if (flag := piece.skip(device)) is not None]
        return torch.stack(flags).amax(0) if len(flags) > 1 else flags[0] if flags else None

    def _work(self) -> list[tuple[Batch, placement.Shards | None]]:
        """What there is to do in this step."""
        parameters: list[Tensor] = []
        groups: list[int] = []
        for index, group in enumerate(self.param_groups):
            parameters += group["params"]
            groups += [index] * len(group["params"])
        streams: list[int] = list(range(len(parameters)))
        gradients: list[Any] = [p.grad for p in parameters]
        active = [g is not None for g in gradients]
        if not all(active):
            parameters, groups, streams, gradients = (
                list(compress(every, active)) for every in (parameters, groups, streams, gradients)
            )
        if not parameters:
            return []
        chains = [self.chain(group) for group in self.param_groups]
        states = [self.state[p] for p in parameters]
        tensors = parameters
        if not {torch.Tensor, torch.nn.Parameter}.issuperset(map(type, parameters)):
            gradients = list(map(placement.local_gradient, parameters, gradients))
            tensors = list(map(placement.local, parameters))
        key = (
            list(map(id, parameters)), list(map(Tensor.data_ptr, tensors)), list(map(Tensor.stride, tensors)),
            list(map(_kind, gradients)), streams, groups, chains, backend.forced(),
        )  # fmt: skip
        buffers = self._same_buffers(states) if key == self._key else None
        if buffers is None:
            self._key = None
            for tensor, gradient in zip(tensors, gradients, strict=True):
                placement.check(tensor, gradient)
            self._initialise(parameters, states, [chains[group] for group in groups])
            self._sort(parameters, tensors, gradients, states, streams, [chains[group] for group in groups])
            self._key = key
            buffers = [bucket.gather(states) for bucket in self._buckets]
        counts = [int(count) + 1 for count in self._counts.tolist()]
        return [
            (self._batch(bucket, tensors, gradients, own, groups, counts), bucket.shards)
            for bucket, own in zip(self._buckets, buffers, strict=True)
        ]

    def chain(self, group: dict[str, Any]) -> Chain:
        """What is done to the parameters of a group.

        Raises:
            ValueError: If the group asks for what is not supported, or two pieces for how weights are stored.
        """
        self._refuse(group)
        storages = [storage for piece in self._pieces if (storage := piece.storage(group)) is not None]
        if len(storages) > 1:
            raise ValueError(f"only one piece may say how weights are stored, got {storages}")
        stages = tuple(stage for piece in self._pieces if (stage := piece.stage(group)) is not None)
        return Chain(stages, storages[0] if storages else PLAIN)

    def _same_buffers(self, states: list[dict[str, Any]]) -> list[list[list[Tensor]]] | None:
        """What each bucket gathers, if every state tensor is what it was when the buckets were made."""
        steps = [state.get("step") for state in states]
        if len(steps) != len(self._steps) or not all(map(is_, steps, self._steps)):
            return None
        try:
            buffers = [bucket.gather(states) for bucket in self._buckets]
            if all(map(eq, map(_places, buffers), (bucket.places for bucket in self._buckets))):
                return buffers
        except KeyError:
            pass
        return None

    def _initialise(
        self, parameters: list[Tensor], states: list[dict[str, Any]], chains: list[Chain]
    ) -> None:
        """Make missing state, bring loaded state into shape, let the step counts share one tensor."""
        # torch's SGD saves no step: where there is a buffer, the first step is behind it.
        counts = [
            float(state.get("step", any(value is not None for value in state.values()))) for state in states
        ]
        made = [
            {buffer.name: _start(buffer, parameter, state.get(buffer.name)) for buffer in chain.buffers}
            for parameter, state, chain in zip(parameters, states, chains, strict=True)
        ]
        self._counts = torch.tensor(counts, dtype=torch.float32, device="cpu")
        self._steps = list(self._counts.unbind())
        for state, buffers, step in zip(states, made, self._steps, strict=True):
            state.update(buffers, step=step)

    def _sort(
        self, parameters: list[Tensor], tensors: list[Tensor], gradients: list[Tensor],
        states: list[dict[str, Any]], streams: list[int], chains: list[Chain],
    ) -> None:  # fmt: skip
        """Sort the parameters of this step into buckets."""
        buckets: dict[Any, Bucket] = {}
        for i, (parameter, tensor, gradient) in enumerate(zip(parameters, tensors, gradients, strict=True)):
            names = [buffer.name for buffer in chains[i].buffers]
            dtypes = tuple(t.dtype for t in (tensor, gradient, *(states[i][name] for name in names)))
            shards = placement.shards(parameter)
            bucket = buckets.setdefault((tensor.device, dtypes, chains[i], shards), Bucket(chains[i], shards))
            bucket.positions.append(i)
            bucket.firsts.append(placement.first_element(parameter))
            bucket.streams.append(streams[i])
            bucket.layouts.append(placement.layout(tensor))
            bucket.plain &= tensor is parameter and tensor.is_contiguous()
        self._buckets = list(buckets.values())
        for bucket in self._buckets:
            bucket.places = _places(bucket.gather(states))

    def _batch(
        self, bucket: Bucket, tensors: list[Tensor], gradients: list[Tensor],
        buffers: list[list[Tensor]], groups: list[int], counts: list[int],
    ) -> Batch:  # fmt: skip
        """This step's batch for a bucket: tensors, and the numbers of every (group, step) among them."""
        places, gradients = [tensors[i] for i in bucket.positions], [gradients[i] for i in bucket.positions]
        tensors = places
        if not bucket.plain:
            tensors = list(map(placement.laid_out, tensors, bucket.layouts))
        if not (bucket.plain and all(map(Tensor.is_contiguous, gradients))):
            gradients = list(map(placement.laid_out, gradients, bucket.layouts))
        pairs = [(groups[i], counts[i]) for i in bucket.positions]
        rows = {pair: row for row, pair in enumerate(dict.fromkeys(pairs))}
        seed, pieces, device = self.seed, self._pieces, tensors[0].device
        shared = self.param_groups[pairs[0][0]]  # every group of a bucket has the same chain
        staged = [piece for piece in pieces if piece.stage(shared) is not None]
        return Batch(
            chain=bucket.chain,
            parameters=tensors,
            gradients=gradients,
            buffers=buffers,
            scalars=[scalar for piece in staged for scalar in piece.scalars(device)],
            words=[
                *(word for piece in staged for word in piece.words(seed)),
                *(word for piece in pieces if piece.storage(shared) for word in piece.storage_words(seed)),
            ],
            firsts=bucket.firsts,
            streams=bucket.streams,
            rows=[rows[pair] for pair in pairs],
            steps=[step for _, step in rows],
            numbers=[
                [number for piece in staged for number in piece.numbers(self.param_groups[group], step)]
                for group, step in rows
            ],
            copies=[(place, used) for place, used in zip(places, tensors, strict=True) if place is not used],
            table=bucket.table,
        )

    # What surrounds the step ----------------------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """The gradient norm before clipping at the latest step, over all groups: 0-d, on the device.

        `None` without `ClipNorm` among the regularizers, and before the first step.
        """
        return next((piece.norm for piece in self._pieces if isinstance(piece, ClipNorm)), None)

    @property
    def seed(self) -> int:
        """The base seed of all random numbers; saved with the parameter groups where there are any."""
        return self.param_groups[0].get("seed", self._seed)

    @contextlib.contextmanager
    def averaged(self, name: str | None = None) -> Iterator[None]:
        """Within the block, parameters hold their averages; afterwards, what they held before.

        Parameters that have not been stepped yet stay as they are.

        Args:
            name: Which average, if there are several; the first by default.

        Raises:
            ValueError: If there is no such average.
            RuntimeError: If averages are swapped in already.
        """
        names = [piece.name for piece in self._pieces if isinstance(piece, EMA)]
        if not names:
            raise ValueError("averaged() needs an average: pass regularizers=[fastreg.EMA(0.999)]")
        if name is not None and name not in names:
            raise ValueError(f"no average is called {name!r}, only {', '.join(map(repr, names))}")
        if self._swapped:
            raise RuntimeError("averages are swapped in already")
        name = name or names[0]
        kept = []
        self._swapped = True
        try:
            with torch.no_grad():
                for parameter, state in self.state.items():
                    if name in state:
                        kept.append((parameter, parameter.clone()))
                        parameter.copy_(state[name])
            yield
        finally:
            with torch.no_grad():
                for parameter, weight in kept:
                    parameter.copy_(weight)
            self._swapped = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; where random numbers are used the group gets the seed.

        Raises:
            ValueError: For options that are not supported, and as in torch.
        """
        group = {**self.defaults, **param_group}
        names = ["step", *(buffer.name for buffer in self.chain(group).buffers)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is taken in the optimizer's state; give the piece another name=")
        super().add_param_group(param_group)
        self._share_seed()

    def _refuse(self, group: dict[str, Any]) -> None:
        for option in _NOT_YET:
            if group.get(option):
                name = type(self).__name__
                fix = f"; use torch.optim.{name}" if hasattr(torch.optim, name) else ""
                raise ValueError(f"{option}={group[option]!r} is not supported by fastreg.{name}{fix}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but the given tensors are copied, and averages keep their precision.

        torch would cast every buffer to the dtype of its parameter.

        Raises:
            RuntimeError: Inside `averaged()`.
            ValueError: For options that are not supported, and as in torch.
        """
        self._refuse_inside("load_state_dict()", "lose what is loaded at its end")
        loaded: dict[str, Any] = {}

        def check(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            for group in state_dict["param_groups"]:
                self._refuse(group)
            loaded.update(state_dict)

        # As the last hook before and the first after, between which nobody else's hooks run.
        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(lambda _: self._keep_precise(loaded), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _keep_precise(self, state_dict: dict[str, Any]) -> None:
        """Copy what torch took over as it is, and take again what it rounded."""
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [(p, group) for group in self.param_groups for p in group["params"]]
        for i, (parameter, group) in zip(saved_ids, parameters, strict=True):
            saved, state = state_dict["state"].get(i, {}), self.state.get(parameter, {})
            precise = {buffer.name for buffer in self.chain(group).buffers if buffer.dtype != "parameter"}
            for name, value in saved.items():
                if name in precise:
                    state[name] = value.to(device=parameter.device, copy=True)
                elif isinstance(value, Tensor) and state[name] is value:
                    state[name] = value.clone()

    def _share_seed(self) -> None:
        if any(self.chain(group).random for group in self.param_groups):
            for group in self.param_groups:
                group.setdefault("seed", self.seed)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep: also the pieces."""
        return {**super().__getstate__(), "_pieces": self._pieces, "_seed": self._seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Buckets are made anew."""
        super().__setstate__(state)
        self._forget()
        self._swapped = False
        self._share_seed()


def _places(buffers: list[list[Tensor]]) -> list[tuple[list[int], list[int]]]:
    """Address and size of each: an address alone may have been given to another tensor meanwhile."""
    return [(list(map(Tensor.data_ptr, buffer)), list(map(Tensor.numel, buffer))) for buffer in buffers]


def _start(buffer: Buffer, parameter: Tensor, value: Tensor | None) -> Tensor:
    """A buffer as the parameter needs it: made, or checked where there is one."""
    inner = placement.local(parameter)
    if value is None:
        dtypes: dict[Any, Any] = {"parameter": inner.dtype, "compute": compute_dtype(inner.dtype)}
        dtype = dtypes.get(buffer.dtype, buffer.dtype)
        made = torch.empty_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
        return made.copy_(parameter) if buffer.start == "parameter" else made.zero_()
    if value.shape != parameter.shape or value.device != parameter.device:
        raise RuntimeError(
            f"state {buffer.name!r} has shape {tuple(value.shape)} on {value.device}, "
            f"its parameter {tuple(parameter.shape)} on {parameter.device}; move it back before step()"
        )
    return value if placement.is_dtensor(value) else placement.laid_out(value, placement.layout(inner))
