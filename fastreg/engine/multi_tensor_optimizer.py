"""One pass over the memory of many parameters: components, put together to chains and run.

    components ──stage──▶ chain            one per parameter group, and variant where not all is always due
    parameters with gradients ──▶ batches, one per (device, dtypes, chain, sharding)
    components.prepare(batches)            reductions, such as the gradient norm, into device scalars
    launch.run(batch)            read weight, gradient and state once; write weight and state once

What a pass shares with former ones is kept in plans, one for each combination of variants, which are made
anew as soon as any parameter, state tensor, dtype, chain or backend differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import compress, repeat
from operator import attrgetter, is_, is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import random
from ..reference.step import compute_dtype
from ..runtime import backend
from . import launch
from . import layout as placement
from .batch import Batch
from .component import Component, Work
from .counts import Counts
from .plan import Bucket, Member, Plan, Variant, sort
from .stage import PLAIN, Buffer, Chain, Storage
from .state import BACKUP, buffer_dtype, fitted, start

_dtype, _layout, _gradient = attrgetter("dtype"), attrgetter("layout"), attrgetter("grad")
_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter}
Gradients = Mapping[Tensor, Tensor] | Sequence[Tensor | None]
PLANS = 8
"""Combinations of variants that are kept: components with periods of their own have few in common."""


class Operands(NamedTuple):
    """What a pass works on: lists of equal length."""

    parameters: list[Tensor]
    gradients: list[Any]
    groups: list[int]
    streams: list[int]

    def only(self, wanted: Iterable[bool]) -> Operands:
        """Returns the operands that are marked in a list of the same length."""
        wanted = list(wanted)
        return self if all(wanted) else Operands(*(list(compress(column, wanted)) for column in self))

    def with_gradient(self) -> Operands:
        """Returns the operands whose gradient is not `None`."""
        return self.only(map(is_not, self.gradients, repeat(None)))


class MultiTensorOptimizer(torch.optim.Optimizer):
    """Base of all that updates parameters: what torch's optimizers are for a loop, this is for one launch.

    A subclass calls `_set_components` before the constructor of torch's optimizer, which makes the groups.
    """

    _state_dtype: torch.dtype | None = None
    reads_backups = False
    """Whether a step reads the weight from `BACKUP` wherever the state of a parameter has one."""

    def _set_components(self, components: Iterable[Component], seed: int | None = None) -> None:
        """Put the components together.

        Args:
            components: In any order of phases; inside a phase the order counts.
            seed: Base of the random numbers.
        """
        self._components = tuple(sorted(components, key=attrgetter("phase")))
        self._periodic = tuple(
            component for component in self._components if type(component).due is not Component.due
        )
        self._seed = random.instance_seed() if seed is None else seed
        random.key(self._seed, random.Purpose.INSTANCE)  # refuses a seed that does not fit
        self.reset_cache()

    def reset_cache(self) -> None:
        """Forgets all that is kept between steps; call it after replacing state or groups."""
        self._layout: Any = None
        self._plans: list[Plan] = []
        self._counts = Counts([], [])

    @property
    def components(self) -> tuple[Component, ...]:
        """The components of a step, in the order in which their stages run."""
        return self._components

    _pieces = components  # the name of former releases

    @property
    def seed(self) -> int:
        """The base seed of all random numbers; saved with the parameter groups where there are any."""
        return self.param_groups[0].get("seed", self._seed)

    # The pass -------------------------------------------------------------------------------------------

    def _operands(self, gradients: Gradients | None = None) -> Operands:
        """Returns all parameters with their gradients, `None` where there is none.

        Args:
            gradients: By parameter, or one for each parameter in order; by default those in `p.grad`.

        Raises:
            ValueError: For another number of gradients than of parameters.
        """
        parameters: list[Tensor] = []
        groups: list[int] = []
        for index, group in enumerate(self.param_groups):
            parameters += group["params"]
            groups += [index] * len(group["params"])
        if gradients is None:
            gradients = list(map(_gradient, parameters))
        elif isinstance(gradients, Mapping):
            gradients = list(map(gradients.get, parameters))
        elif len(gradients) != len(parameters):
            raise ValueError(
                f"gradients must hold one for each of {len(parameters)} parameters, got {len(gradients)}"
            )
        return Operands(parameters, list(gradients), groups, list(range(len(parameters))))

    def _absent(self, operands: Operands) -> list[tuple[Tensor, dict[str, Any]]]:
        """The local tensors and states of the parameters that are not worked on."""
        if len(operands.parameters) == sum(len(group["params"]) for group in self.param_groups):
            return []
        present = set(map(id, operands.parameters))
        every = (p for group in self.param_groups for p in group["params"])
        return [
            (placement.local(p), self.state[p]) for p in every if id(p) not in present and p in self.state
        ]

    @torch.no_grad()
    def _run_step(self, operands: Operands) -> dict[torch.device, Tensor] | None:
        """Runs one step of all components over the operands.

        Args:
            operands: All of which have a gradient.

        Returns:
            For each device that may skip the step, its flag: `[1]`, not 0 if it did; `None` if there was
            nothing to do.
        """
        work = self._work(operands)
        if not work.batches:
            return None
        work.absent = self._absent(operands)
        for component in self._components:
            component.prepare(work)
        flags: dict[torch.device, Tensor] = {}
        for batch, _ in work.batches:
            if batch.device not in flags and (flag := self._skip(batch.device)) is not None:
                flags[batch.device] = flag
            batch.skip = flags.get(batch.device)
        for batch, _ in work.batches:
            launch.run(batch)
        for component in self._components:
            component.finish(work, flags)
        self._counts.add(flags)
        return flags

    def _skip(self, device: torch.device) -> Tensor | None:
        flags = [flag for component in self._components if (flag := component.skip(device)) is not None]
        return torch.stack(flags).amax(0) if len(flags) > 1 else flags[0] if flags else None

    def _work(self, operands: Operands) -> Work:
        """What there is to do."""
        parameters, gradients, groups, streams = operands
        if not parameters:
            return Work([], 0, [], [])
        tensors, dtypes = parameters, list(map(_dtype, gradients))
        if (
            not _PLAIN_TYPES.issuperset(map(type, parameters))
            or any(d.is_complex for d in set(dtypes))
            or any(map(Tensor.is_neg, gradients))
        ):
            gradients = list(map(placement.local_gradient, parameters, gradients))
            tensors = list(map(placement.local, parameters))
        ids = list(map(id, parameters))
        states = (
            list(self.state.values())  # which hashes no tensors
            if list(map(id, self.state)) == ids
            else [self.state.get(p, {}) for p in parameters]
        )
        layout = (
            ids, list(map(Tensor.data_ptr, tensors)), list(map(Tensor.stride, tensors)), dtypes,
            list(map(_layout, gradients)), streams, groups, backend.forced(),
        )  # fmt: skip
        steps = [state.get("step") for state in states]
        if (
            layout != self._layout
            or len(steps) != len(self._counts.views)
            or not all(map(is_, steps, self._counts.views))
        ):
            self._plans, self._layout = [], None
            for tensor, gradient in zip(tensors, gradients, strict=True):
                placement.check(tensor, gradient)
            placement.check_apart(tensors, gradients)
            for group, dtype in dict.fromkeys(zip(groups, (t.dtype for t in tensors), strict=True)):
                self.chain(self.param_groups[group], dtype)  # refuses what is not supported
            states = [self.state[p] for p in parameters]
            self._count(states, groups, tensors)
            self._layout = layout
        done = self._counts.on_host()
        variants = self._variants(states, groups, done)
        plan = next((plan for plan in self._plans if plan.variants == variants), None)
        buffers = plan.gather(states) if plan is not None and self._same_chains(plan) else None
        if plan is None or buffers is None:
            self._plans = [kept for kept in self._plans if kept is not plan][: PLANS - 1]
            members = self._members(parameters, tensors, gradients, streams, groups, variants)
            self._initialise(members)
            plan = Plan(variants, sort(members), sum(p.numel() for p in parameters))
            self._plans.insert(0, plan)
            buffers = [bucket.gather(states) for bucket in plan.buckets]
        batches = [
            (self._batch(bucket, tensors, gradients, own, groups, done), bucket.shards)
            for bucket, own in zip(plan.buckets, buffers, strict=True)
        ]
        return Work(batches, plan.elements, tensors, states)

    def _variants(
        self, states: list[dict[str, Any]], groups: list[int], done: list[float]
    ) -> Variant | list[Variant]:
        """The variant of all parameters, or that of each where they differ."""
        name = BACKUP.name
        held = [name in state for state in states] if self.reads_backups else [False] * len(states)
        if not self._periodic and len(set(held)) == 1:
            return Variant((), held[0])
        kinds = list(zip(groups, done, held, strict=True))
        found = {kind: self._variant(*kind) for kind in dict.fromkeys(kinds)}
        different = set(found.values())
        return different.pop() if len(different) == 1 else [found[kind] for kind in kinds]

    def _variant(self, group: int, done: float, backup: bool) -> Variant:
        options, step = self.param_groups[group], int(done) + 1
        always = bool(options.get("capturable"))
        return Variant(tuple(always or component.due(options, step) for component in self._periodic), backup)

    def _members(
        self, parameters: list[Tensor], tensors: list[Tensor], gradients: list[Tensor], streams: list[int],
        groups: list[int], variants: Variant | list[Variant],
    ) -> list[Member]:  # fmt: skip
        """The parameters of this pass, each with its chain."""
        each = variants if isinstance(variants, list) else [variants] * len(parameters)
        kinds = [(group, t.dtype, variant) for group, t, variant in zip(groups, tensors, each, strict=True)]
        chains = {kind: self.chain(self.param_groups[kind[0]], *kind[1:]) for kind in dict.fromkeys(kinds)}
        return [
            Member(
                parameter, tensor, gradient, self.state[parameter], stream, kind[0],
                bool(self.param_groups[kind[0]].get("capturable")), kind[2], chains[kind],
            )
            for parameter, tensor, gradient, stream, kind in zip(
                parameters, tensors, gradients, streams, kinds, strict=True
            )
        ]  # fmt: skip

    def _due(self, variant: Variant | None) -> list[Component]:
        """The components that take part."""
        if variant is None or not self._periodic:
            return list(self._components)
        out = {id(component) for component, due in zip(self._periodic, variant.due, strict=True) if not due}
        return [component for component in self._components if id(component) not in out]

    def chain(self, group: dict[str, Any], dtype: torch.dtype, variant: Variant | None = None) -> Chain:
        """What is done to the parameters of this dtype in a group.

        Args:
            group: The group.
            dtype: The dtype.
            variant: What is done this time; by default all that is done at any time.

        Raises:
            ValueError: If the group asks for what is not supported, or two components set the storage.
        """
        self._check_group(group)
        due = self._due(variant)
        storages = [found for component in due if (found := component.storage(group, dtype)) is not None]
        if len(storages) > 1:
            raise ValueError(f"only one component may say how weights are stored, got {storages}")
        stages = tuple(stage for component in due if (stage := component.stage(group)) is not None)
        storage = storages[0] if storages else PLAIN
        return Chain(stages, from_backup(storage) if variant and variant.backup else storage)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse a group that asks for what is not supported."""

    def _chains(self, group: dict[str, Any]) -> list[Chain]:
        """What is done to the parameters of a group, whatever their dtypes are."""
        dtypes = dict.fromkeys(placement.local(p).dtype for p in group["params"])
        return [self.chain(group, dtype) for dtype in dtypes]

    def _same_chains(self, plan: Plan) -> bool:
        """Whether groups still ask for what the buckets were made for."""
        return all(
            self.chain(self.param_groups[index], bucket.dtypes[0], bucket.variant) == bucket.chain
            and bool(self.param_groups[index].get("capturable")) == bucket.capturable
            for bucket in plan.buckets
            for index in bucket.groups
        )

    # State ----------------------------------------------------------------------------------------------

    def _count(self, states: list[dict[str, Any]], groups: list[int], tensors: list[Tensor]) -> None:
        """Let the step counts share a tensor."""
        # torch's SGD saves no step: where there is momentum, the first step is behind it.
        counts = [float(s.get("step", s.get("momentum_buffer") is not None)) for s in states]
        capturable = [bool(self.param_groups[group].get("capturable")) for group in groups]
        places = [t.device if device else None for t, device in zip(tensors, capturable, strict=True)]
        self._counts = Counts(counts, places)
        for state, view in zip(states, self._counts.views, strict=True):
            state["step"] = view

    def _initialise(self, members: list[Member]) -> None:
        """Make missing state, also of what is not due yet, and bring loaded state into shape."""
        kinds = {(m.group, m.tensor.dtype): m for m in members}
        whole = {kind: self.chain(self.param_groups[kind[0]], kind[1]) for kind in kinds}
        made = []
        for m in members:
            chain = whole[m.group, m.tensor.dtype]
            wanted = {buffer.name: buffer for buffer in (*chain.buffers, *m.chain.buffers)}
            made.append({name: self._buffer(m, chain, buffer) for name, buffer in wanted.items()})
        for member, buffers in zip(members, made, strict=True):
            member.state.update(buffers)

    def _buffer(self, member: Member, chain: Chain, buffer: Buffer) -> Tensor:
        value = member.state.get(buffer.name)
        if value is not None:
            return fitted(buffer, member.parameter, value)
        dtype = self.buffer_dtype(chain, buffer, member.parameter)
        weight = member.state[BACKUP.name] if member.variant.backup else member.parameter
        return start(buffer, weight, member.stream, dtype, self._components)

    def buffer_dtype(self, chain: Chain, buffer: Buffer, parameter: Tensor) -> torch.dtype:
        """What a buffer of a parameter holds."""
        return buffer_dtype(chain, buffer, parameter, self._state_dtype)

    # Batches --------------------------------------------------------------------------------------------

    def _batch(
        self, bucket: Bucket, tensors: list[Tensor], gradients: list[Tensor],
        buffers: list[list[Tensor]], groups: list[int], done: list[float],
    ) -> Batch:  # fmt: skip
        """This step's batch for a bucket: tensors, and the numbers of every (group, step) among them."""
        tensors = originals = bucket.own(tensors)
        gradients = bucket.own(gradients)
        if not bucket.plain:
            tensors = list(map(placement.laid_out, tensors, bucket.layouts))
        if not (bucket.plain and all(map(Tensor.is_contiguous, gradients))):
            gradients = list(map(placement.laid_out, gradients, bucket.layouts))
        seed, device = self.seed, tensors[0].device
        shared = self.param_groups[groups[bucket.positions[0]]]  # every group of a bucket has the same chain
        components = self._due(bucket.variant)
        staged = [component for component in components if component.stage(shared) is not None]
        rows: list[int]
        steps: Any
        step_scalars: Any
        if bucket.capturable:
            rows = list(range(len(bucket.positions)))
            steps, step_scalars = self._device_step_scalars(bucket, groups, staged)
        else:
            rows, pairs = _rows(bucket, groups, done)
            steps = [step for _, step in pairs]
            step_scalars = [
                [
                    number
                    for component in staged
                    for number in component.step_scalars(self.param_groups[group], step)
                ]
                for group, step in pairs
            ]
        return Batch(
            chain=bucket.chain,
            parameters=tensors,
            gradients=gradients,
            buffers=buffers,
            device_scalars=[scalar for component in staged for scalar in component.device_scalars(device)],
            rng_keys=[
                *(word for component in staged for word in component.rng_keys(seed)),
                *(
                    word
                    for component in components
                    if bucket.chain.storage.rng_keys and component.storage(shared, bucket.dtypes[0])
                    for word in component.storage_rng_keys(seed)
                ),
            ],
            firsts=bucket.firsts,
            streams=bucket.streams,
            rows=rows,
            steps=steps,
            step_scalars=step_scalars,
            places=bucket.units,
            copies=[
                (place, used) for place, used in zip(originals, tensors, strict=True) if place is not used
            ],
            table=bucket.table,
            memory=bucket.memory,
        )

    def _device_step_scalars(
        self, bucket: Bucket, groups: list[int], staged: list[Component]
    ) -> tuple[Tensor, Tensor]:
        """Step counts and numbers of each parameter of a bucket, worked out on the device in double."""
        steps = torch.stack([self._counts.views[i] for i in bucket.positions]).double() + 1
        step_scalars = steps.new_empty(
            len(bucket.positions), sum(stage.step_scalars for stage in bucket.chain.stages)
        )
        for group in bucket.groups:
            own = [row for row, i in enumerate(bucket.positions) if groups[i] == group]
            # Parameters of a group follow each other.
            rows = slice(own[0], own[-1] + 1)
            found = (
                n
                for component in staged
                for n in component.step_scalars(self.param_groups[group], steps[rows])
            )
            for column, number in enumerate(found):
                if isinstance(number, Tensor):
                    step_scalars[rows, column] = number
                else:
                    step_scalars[rows, column].fill_(number)
        return steps.long(), step_scalars.to(compute_dtype(bucket.dtypes[0]))

    # Copies ---------------------------------------------------------------------------------------------

    _KEPT: tuple[str, ...] = ("_components", "_periodic", "_seed", "_state_dtype", "reads_backups")

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles keep: also the components."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._KEPT}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Plans are made anew."""
        super().__setstate__(state)
        self.reset_cache()


def _rows(bucket: Bucket, groups: list[int], done: list[float]) -> tuple[list[int], list[tuple[int, int]]]:
    """The (group, step) pairs in a bucket, and which of them is whose."""
    if len(set(done)) == 1:
        return bucket.owners, [(group, int(done[0]) + 1) for group in bucket.groups]
    own = [(groups[i], int(done[i]) + 1) for i in bucket.positions]
    rows = {pair: row for row, pair in enumerate(dict.fromkeys(own))}
    return [rows[pair] for pair in own], list(rows)


def from_backup(storage: Storage) -> Storage:
    """The storage with the weight read from `BACKUP` instead of the parameter."""
    sources = tuple(BACKUP.name if source == "parameter" else source for source in storage.sources)
    return replace(storage, sources=sources, buffers=(*storage.buffers, BACKUP))
