"""The step engine: an optimizer is a list of pieces, run in one pass over memory.

    pieces ──stage──▶ chain            one per parameter group
    parameters with gradients ──▶ batches, one per (device, dtypes, chain, sharding)
    pieces.prepare(batches)            reductions, such as the gradient norm, into device scalars
    multi_tensor.run(batch)            read weight, gradient and state once; write weight and state once

What a step shares with the last one is kept in buckets, which are made anew as soon as any parameter,
state tensor, dtype, chain or backend differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from itertools import compress
from operator import attrgetter, eq, is_
from typing import Any

import torch
from torch import Tensor

from .. import backend, multi_tensor, random
from ..chain import PLAIN, Buffer, Chain
from ..multi_tensor import Batch
from ..reference.step import compute_dtype
from . import amp, decay, placement
from .buckets import Bucket, Member, places, sort
from .counts import Counts, Verdict
from .measurement import Measurement
from .piece import Piece, Work
from .regularizers import EMA, ClipNorm
from .rounding import Rounding
from .rules import Descend, Maximize
from .state import buffer_dtype, fitted, start

_kind = attrgetter("dtype", "layout")

IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")
"""Keys of a group that say how a step is computed, not what: a checkpoint does not change them."""
NONFINITE = ("propagate", "skip", "raise")


class Engine(torch.optim.Optimizer):
    """Base of the optimizers: composes pieces into chains and runs them.

    A subclass also derives from the torch optimizer it stands in for, and calls `_compose` before the
    constructor of that one, which checks the arguments and makes the parameter groups.
    """

    def _compose(
        self, rule: Piece, decay_kind: str | None, regularizers: Iterable[Piece], seed: int | None,
        bf16: str, state_dtype: torch.dtype | None, nonfinite: str,
    ) -> None:  # fmt: skip
        """Put the pieces together.

        Args:
            rule: The update rule.
            decay_kind: See `decay`; `None`: what the group's `decoupled_weight_decay` says.
            regularizers: What the user adds.
            seed: Base of the random numbers.
            bf16: How 16-bit weights are rounded, see `Rounding`.
            state_dtype: Of the state buffers; `None`: that of the parameter, float32 beside a remainder.
            nonfinite: What to do about gradients that are not finite.

        Raises:
            TypeError: If a regularizer is not a piece, or state_dtype not a dtype.
            ValueError: For values out of range, and regularizers that exclude each other.
        """
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
        if state_dtype is not None and not isinstance(state_dtype, torch.dtype):
            raise TypeError(f"state_dtype must be a torch.dtype such as torch.bfloat16, got {state_dtype!r}")
        if state_dtype is not None and not state_dtype.is_floating_point:
            raise ValueError(f"state_dtype must be a floating-point dtype, got {state_dtype}")
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {', '.join(map(repr, NONFINITE))}, got {nonfinite!r}")
        clip = next((piece for piece in regularizers if isinstance(piece, ClipNorm)), None)
        needed = [piece for piece in regularizers if piece.needs_norm]
        if clip is not None and clip.error_if_nonfinite:
            nonfinite = "raise"
        if clip is not None and clip.norm_type != 2 and needed:
            raise ValueError(f"{needed[0]!r} needs the L2 norm, but {clip!r} measures another")
        self._decay_kind = decay_kind
        self._state_dtype, self._nonfinite = state_dtype, nonfinite
        self._measurement = Measurement(clip, bool(needed), nonfinite)
        own = (Maximize(), self._measurement, decay.Penalty(decay_kind), rule, decay.Shrinkage(decay_kind))
        self._pieces = tuple(
            sorted((*own, Rounding(bf16), *regularizers, Descend()), key=attrgetter("phase"))
        )
        self._seed = random.instance_seed() if seed is None else seed
        random.key(self._seed, random.Purpose.INSTANCE)  # refuses a seed that does not fit
        self._forget()
        amp.silence()

    def _forget(self) -> None:
        self._key: Any = None
        self._buckets: list[Bucket] = []
        self._counts = Counts([], [])
        self._verdict: Verdict | None = None
        self._swapped = False

    # The step -------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # `torch.compiler.disable` would import Dynamo, and triton with it
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scaler: Any = None) -> Any:
        """Take one optimization step; parameters without a gradient are left alone.

        Args:
            closure: Reevaluates the model and returns the loss.
            grad_scaler: For `torch.amp.GradScaler.step(optimizer)`, which passes itself.

        Returns:
            What the closure returns, `None` without one.

        Raises:
            RuntimeError: Inside `averaged()`, for sparse gradients, and with `nonfinite="raise"` if those of
                the last step were not finite.
        """
        self._check_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_inside("step()", "train the averaged weights")
        self._settle(report=True)
        scaling = self._measurement.scaling = amp.scaling(self, grad_scaler)
        work = self._work()
        if not work.batches:
            return loss
        for piece in self._pieces:
            piece.prepare(work)
        flags = {}
        for batch, _ in work.batches:
            if batch.device not in flags and (flag := self._skip(batch.device)) is not None:
                flags[batch.device] = flag
            batch.skip = flags.get(batch.device)
        for batch, _ in work.batches:
            multi_tensor.run(batch)
        self._counts.add(flags)
        if flags and not self._capturing():
            report = self._nonfinite == "raise" and not scaling.active
            self._verdict = Verdict(next(iter(flags.values())), self._counts, report)
        return loss

    def _settle(self, report: bool = False) -> None:
        """Correct the count of a step that was skipped on a device: whoever reads counts calls this."""
        verdict = self._verdict
        if verdict is not None and verdict.skipped() and report:
            self._verdict = None
            if verdict.report:
                raise RuntimeError(
                    "the gradients of the last step were not finite; it was skipped, weights and state are "
                    "as they were before (nonfinite='skip' goes on, 'propagate' updates nevertheless)"
                )

    def _capturing(self) -> bool:
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

    def _check_capture(self) -> None:
        if self._capturing() and not all(group.get("capturable") for group in self.param_groups):
            raise RuntimeError(
                f"CUDA graph capture of {type(self).__name__}.step() needs capturable=True in every group"
            )

    def _refuse_inside(self, what: str, consequence: str) -> None:
        if self._swapped:
            raise RuntimeError(f"{what} inside `with optimizer.averaged():` would {consequence}")

    def _skip(self, device: torch.device) -> Tensor | None:
        flags = [flag for piece in self._pieces if (flag := piece.skip(device)) is not None]
        return torch.stack(flags).amax(0) if len(flags) > 1 else flags[0] if flags else None

    def _work(self) -> Work:
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
            return Work([], 0)
        states = [self.state.get(p, {}) for p in parameters]
        tensors = parameters
        if not _PLAIN_TYPES.issuperset(map(type, parameters)) or any(map(Tensor.is_complex, parameters)):
            gradients = list(map(placement.local_gradient, parameters, gradients))
            tensors = list(map(placement.local, parameters))
        key = (
            list(map(id, parameters)), list(map(Tensor.data_ptr, tensors)), list(map(Tensor.stride, tensors)),
            list(map(_kind, gradients)), streams, groups, backend.forced(),
        )  # fmt: skip
        buffers = self._same_buffers(states) if key == self._key and self._same_chains() else None
        if buffers is None:
            self._key = None
            for tensor, gradient in zip(tensors, gradients, strict=True):
                placement.check(tensor, gradient)
            placement.check_apart(tensors, gradients)
            members = self._members(parameters, tensors, gradients, streams, groups)
            states = [member.state for member in members]
            self._initialise(members)
            self._buckets = sort(members)
            self._key, self._elements = key, sum(p.numel() for p in parameters)
            buffers = [bucket.gather(states) for bucket in self._buckets]
        counts = [count + 1 for count in self._counts.on_host()]
        batches = [
            (self._batch(bucket, tensors, gradients, own, groups, counts), bucket.shards)
            for bucket, own in zip(self._buckets, buffers, strict=True)
        ]
        return Work(batches, self._elements)

    def _members(
        self, parameters: list[Tensor], tensors: list[Tensor], gradients: list[Tensor], streams: list[int],
        groups: list[int],
    ) -> list[Member]:  # fmt: skip
        """The parameters of this step, each with its chain; groups that cannot be had are refused here."""
        kinds = [(group, tensor.dtype) for group, tensor in zip(groups, tensors, strict=True)]
        chains = {kind: self.chain(self.param_groups[kind[0]], kind[1]) for kind in dict.fromkeys(kinds)}
        return [
            Member(
                parameter, tensor, gradient, self.state[parameter], stream, group,
                bool(self.param_groups[group].get("capturable")), chains[group, tensor.dtype],
            )
            for parameter, tensor, gradient, stream, group in zip(
                parameters, tensors, gradients, streams, groups, strict=True
            )
        ]  # fmt: skip

    def chain(self, group: dict[str, Any], dtype: torch.dtype) -> Chain:
        """What is done to the parameters of this dtype in a group.

        Raises:
            ValueError: If the group asks for what is not supported, or two pieces for how weights are stored.
        """
        if group.get("differentiable"):
            self._refuse_differentiable(group)
        storages = [found for piece in self._pieces if (found := piece.storage(group, dtype)) is not None]
        if len(storages) > 1:
            raise ValueError(f"only one piece may say how weights are stored, got {storages}")
        stages = tuple(stage for piece in self._pieces if (stage := piece.stage(group)) is not None)
        return Chain(stages, storages[0] if storages else PLAIN)

    def _chains(self, group: dict[str, Any]) -> list[Chain]:
        """What is done to the parameters of a group, whatever their dtypes are."""
        dtypes = dict.fromkeys(placement.local(p).dtype for p in group["params"])
        return [self.chain(group, dtype) for dtype in dtypes]

    def _same_chains(self) -> bool:
        """Whether groups still ask for what the buckets were made for."""
        return all(
            self.chain(self.param_groups[index], bucket.dtypes[0]) == bucket.chain
            and bool(self.param_groups[index].get("capturable")) == bucket.capturable
            for bucket in self._buckets
            for index in bucket.groups
        )

    def _same_buffers(self, states: list[dict[str, Any]]) -> list[list[list[Tensor]]] | None:
        """What each bucket gathers, if every state tensor is what it was when the buckets were made."""
        steps = [state.get("step") for state in states]
        if len(steps) != len(self._counts.views) or not all(map(is_, steps, self._counts.views)):
            return None
        try:
            buffers = [bucket.gather(states) for bucket in self._buckets]
            if all(map(eq, map(places, buffers), (bucket.places for bucket in self._buckets))):
                return buffers
        except KeyError:
            pass
        return None

    def _initialise(self, members: list[Member]) -> None:
        """Make missing state, bring loaded state into shape, let the step counts share a tensor."""
        # torch's SGD saves no step: where there is a buffer, the first step is behind it.
        counts = [
            float(m.state.get("step", any(value is not None for value in m.state.values()))) for m in members
        ]
        made = [{buffer.name: self._buffer(m, buffer) for buffer in m.chain.buffers} for m in members]
        self._counts = Counts(counts, [m.tensor.device if m.capturable else None for m in members])
        for member, buffers, step in zip(members, made, self._counts.views, strict=True):
            member.state.update(buffers, step=step)

    def _buffer(self, member: Member, buffer: Buffer) -> Tensor:
        value = member.state.get(buffer.name)
        if value is not None:
            return fitted(buffer, member.parameter, value)
        dtype = self.buffer_dtype(member.chain, buffer, member.parameter)
        return start(buffer, member.parameter, member.stream, dtype, self._pieces)

    def buffer_dtype(self, chain: Chain, buffer: Buffer, parameter: Tensor) -> torch.dtype:
        """What a buffer of a parameter holds."""
        return buffer_dtype(chain, buffer, parameter, self._state_dtype)

    def _batch(
        self, bucket: Bucket, tensors: list[Tensor], gradients: list[Tensor],
        buffers: list[list[Tensor]], groups: list[int], counts: list[int],
    ) -> Batch:  # fmt: skip
        """This step's batch for a bucket: tensors, and the numbers of every (group, step) among them."""
        originals = [tensors[i] for i in bucket.positions]
        tensors, gradients = originals, [gradients[i] for i in bucket.positions]
        if not bucket.plain:
            tensors = list(map(placement.laid_out, tensors, bucket.layouts))
        if not (bucket.plain and all(map(Tensor.is_contiguous, gradients))):
            gradients = list(map(placement.laid_out, gradients, bucket.layouts))
        seed, pieces, device = self.seed, self._pieces, tensors[0].device
        shared = self.param_groups[groups[bucket.positions[0]]]  # every group of a bucket has the same chain
        staged = [piece for piece in pieces if piece.stage(shared) is not None]
        rows: list[int]
        steps: Any
        numbers: Any
        if bucket.capturable:
            rows = list(range(len(bucket.positions)))
            steps, numbers = self._device_numbers(bucket, groups, staged)
        else:
            pairs = [(groups[i], counts[i]) for i in bucket.positions]
            row_of = {pair: row for row, pair in enumerate(dict.fromkeys(pairs))}
            rows, steps = [row_of[pair] for pair in pairs], [step for _, step in row_of]
            numbers = [
                [number for piece in staged for number in piece.numbers(self.param_groups[group], step)]
                for group, step in row_of
            ]
        return Batch(
            chain=bucket.chain,
            parameters=tensors,
            gradients=gradients,
            buffers=buffers,
            scalars=[scalar for piece in staged for scalar in piece.scalars(device)],
            words=[
                *(word for piece in staged for word in piece.words(seed)),
                *(
                    word
                    for piece in pieces
                    if bucket.chain.storage.words and piece.storage(shared, bucket.dtypes[0])
                    for word in piece.storage_words(seed)
                ),
            ],
            firsts=bucket.firsts,
            streams=bucket.streams,
            rows=rows,
            steps=steps,
            numbers=numbers,
            places=bucket.units,
            copies=[
                (place, used) for place, used in zip(originals, tensors, strict=True) if place is not used
            ],
            table=bucket.table,
        )

    def _device_numbers(
        self, bucket: Bucket, groups: list[int], staged: list[Piece]
    ) -> tuple[Tensor, Tensor]:
        """Step counts and numbers of each parameter of a bucket, worked out on the device in double."""
        steps = torch.stack([self._counts.views[i] for i in bucket.positions]).double() + 1
        numbers = steps.new_empty(len(bucket.positions), sum(stage.numbers for stage in bucket.chain.stages))
        for group in bucket.groups:
            own = [row for row, i in enumerate(bucket.positions) if groups[i] == group]
            # Parameters of a group follow each other.
            rows = slice(own[0], own[-1] + 1)
            found = (n for piece in staged for n in piece.numbers(self.param_groups[group], steps[rows]))
            for column, number in enumerate(found):
                if isinstance(number, Tensor):
                    numbers[rows, column] = number
                else:
                    numbers[rows, column].fill_(number)
        return steps.long(), numbers.to(compute_dtype(bucket.dtypes[0]))

    # What surrounds the step ----------------------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """The gradient norm before clipping at the latest step, over all groups: 0-d, on the device.

        `None` without `ClipNorm` among the regularizers, and before the first step.
        """
        clips = any(isinstance(piece, ClipNorm) for piece in self._pieces)
        return self._measurement.norm if clips else None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What `torch.amp.GradScaler` asks: whether the step divides by the scale itself."""
        clips = any(isinstance(piece, ClipNorm) for piece in self._pieces)
        return amp.supports_scaling(self.param_groups, clips)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch's constructors set it; here it follows from the groups and pieces."""

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
        chain = self.chain(group, torch.float32)
        names = ["step", *(buffer.name for buffer in chain.buffers)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is taken in the optimizer's state; give the piece another name=")
        super().add_param_group(param_group)
        decay.complete(self.param_groups[-1], self._decay_kind)
        self._share_seed()

    def _refuse_differentiable(self, group: dict[str, Any]) -> None:
        if group.get("fused"):
            raise RuntimeError("`fused` does not support `differentiable`")
        name = type(self).__name__
        fix = f"; use torch.optim.{name}" if hasattr(torch.optim, name) else ""
        raise ValueError(f"differentiable=True is not supported by fastreg.{name}{fix}")

    def state_dict(self) -> dict[str, Any]:
        """As in torch; a step that was skipped on a device does not count."""
        self._settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but tensors are copied, and nothing is rounded that was not.

        torch would share the given tensors, cast every buffer to the dtype of its parameter, and take over
        with the groups how the saved optimizer was implemented (`foreach`, `fused`, `capturable`).  Options
        that the given groups do not know keep their values.

        Raises:
            RuntimeError: Inside `averaged()`.
            ValueError: For options that are not supported, and as in torch.
        """
        self._refuse_inside("load_state_dict()", "lose what is loaded at its end")
        loaded: dict[str, Any] = {}
        former = [dict(group) for group in self.param_groups]

        def check(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            for group, kept in zip(state_dict["param_groups"], former, strict=False):
                self.chain({**kept, **group, **_own(kept)}, torch.float32)
            loaded.update(state_dict)

        def keep(optimizer: torch.optim.Optimizer) -> None:
            for group, kept in zip(self.param_groups, former, strict=True):
                group.update({**kept, **group, **_own(kept)})
            self._keep_precise(loaded)

        # As the last hook before and the first after, between which nobody else's hooks run.
        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(keep, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _keep_precise(self, state_dict: dict[str, Any]) -> None:
        """Take again what torch rounded or shares, in the dtype that it has here."""
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [(p, group) for group in self.param_groups for p in group["params"]]
        for i, (parameter, group) in zip(saved_ids, parameters, strict=True):
            saved, state = state_dict["state"].get(i, {}), self.state.get(parameter, {})
            chain = self.chain(group, placement.local(parameter).dtype)
            own = {buffer.name: self.buffer_dtype(chain, buffer, parameter) for buffer in chain.buffers}
            for name, value in saved.items():
                if not isinstance(value, Tensor):
                    continue
                if name in own:
                    state[name] = value.to(parameter.device, own[name], copy=True)
                elif state[name] is value or not (value.is_floating_point() or value.is_complex()):
                    state[name] = value.to(state[name].device, copy=True)

    def _share_seed(self) -> None:
        chains = (chain for group in self.param_groups for chain in self._chains(group))
        if any(stage.words for chain in chains for stage in chain.stages):
            for group in self.param_groups:
                group.setdefault("seed", self.seed)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep: also the pieces."""
        self._settle()
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _COMPOSED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Buckets are made anew."""
        super().__setstate__(state)
        self._forget()
        self._share_seed()


_COMPOSED = ("_pieces", "_measurement", "_seed", "_decay_kind", "_state_dtype", "_nonfinite")
_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter}


def _own(group: dict[str, Any]) -> dict[str, Any]:
    """Of a group, what a checkpoint does not change."""
    return {name: group[name] for name in IMPLEMENTATION if name in group}
