"""Runs a step over many parameters: joins components to chains, sorts parameters into batches, launches.

    components ──stage──▶ chain            one per parameter group, and variant if some are not always due
    parameters with gradients ──▶ batches, one per (device, dtypes, chain, sharding)
    component.prepare(plan)                reductions, such as the gradient norm, into device scalars
    launch.run(batch)                      read weight, gradient and state once; write weight and state once

Plans keep the batches from step to step, one plan for each combination of variants.  They are made anew as
soon as any parameter, state tensor, dtype, chain or backend differs.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from ..common import random
from ..runtime import backend
from . import launch
from . import layout as memory_layout
from .component import Component, staged_components
from .plan import Counts, Operands, Plan, PlannedBatch, Variant, sort_into_batches
from .stage import PLAIN, Buffer, Chain
from .state import BACKUP, buffer_dtype, fitted, from_backup, init_buffer

_dtype, _layout, _gradient = attrgetter("dtype"), attrgetter("layout"), attrgetter("grad")
_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter}
Gradients = Mapping[Tensor, Tensor] | Sequence[Tensor | None]
PLANS = 8
"""How many plans are kept, one per combination of stages that take part."""


class MultiTensorOptimizer(torch.optim.Optimizer):
    """Base of all optimizers that update many parameters in one launch, instead of a loop over them.

    A subclass calls `_set_components` before the constructor of torch's optimizer, which makes the groups.
    """

    _state_dtype: torch.dtype | None = None
    _switches: tuple[Any, ...] = ()
    """Objects besides the options of groups on which stages depend: plans are checked when one changes."""
    reads_backups = False
    """Whether a step reads the weight from `BACKUP` wherever the state of a parameter has one."""

    def _set_components(self, components: Iterable[Component], seed: int | None = None) -> None:
        """Sets the components of a step.

        Args:
            components: In any order of phases; inside a phase the order counts.
            seed: Base of the random numbers.
        """
        components = tuple(components)
        for component in components:
            if not hasattr(component, "phase"):
                raise TypeError(f"{type(component).__name__} has no phase: set one, such as Phase.CLIP")
        self._components = tuple(sorted(components, key=attrgetter("phase")))
        self._overriding = {
            name: [c for c in self._components if getattr(type(c), name) is not getattr(Component, name)]
            for name in ("due", "prepare", "skip", "finish", "rng_keys", "step_scalars")
        }
        self._seed = random.base_seed(seed)
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

    _pieces = property(lambda self: self._components)  # the name of former releases

    @property
    def seed(self) -> int:
        """The base seed of all random numbers; saved with the parameter groups where there are any."""
        return self.param_groups[0].get("seed", self._seed)

    # The step -------------------------------------------------------------------------------------------

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

    @torch.no_grad()
    def _run_step(self, operands: Operands) -> dict[torch.device, Tensor] | None:
        """Runs one step of all components over the operands.

        Args:
            operands: Parameters and groups; all have a gradient.

        Returns:
            For each device that may skip the step, its flag: `[1]`, not 0 if it did; `None` if there was
            nothing to do.
        """
        if not operands.parameters:
            return None
        plan = self._plan_step(operands)
        try:
            for component in self._overriding["prepare"]:
                component.prepare(plan)
            flags: dict[torch.device, Tensor] = {}
            for device in plan.devices:
                skips = [component.skip(device) for component in self._overriding["skip"]]
                if skips := [flag for flag in skips if flag is not None]:
                    flags[device] = torch.stack(skips).amax(0) if len(skips) > 1 else skips[0]
            for batch in plan.batches:
                batch.skip = flags.get(batch.device)
                launch.run(batch)
            for component in self._overriding["finish"]:
                component.finish(plan, flags)
        finally:
            plan.release()
        self._counts.add(flags)
        return flags

    def _plan_step(self, operands: Operands) -> Plan:
        """Finds or makes the plan of a step, and fills its batches with tensors and numbers."""
        parameters, gradients, groups, streams = operands
        tensors, dtypes = parameters, list(map(_dtype, gradients))
        if (
            not _PLAIN_TYPES.issuperset(map(type, parameters))
            or any(d.is_complex for d in set(dtypes))
            or any(map(Tensor.is_neg, gradients))
        ):
            gradients = list(map(memory_layout.local_gradient, parameters, gradients))
            tensors = list(map(memory_layout.local, parameters))
        ids = list(map(id, parameters))
        states = (
            list(self.state.values())  # which hashes no tensors
            if list(map(id, self.state)) == ids
            else [self.state.get(p, {}) for p in parameters]
        )
        layout = (
            ids, list(map(Tensor.data_ptr, tensors)), list(map(Tensor.stride, tensors)), dtypes,
            list(map(_layout, gradients)), streams, groups,
            backend.override, os.environ.get(backend.VARIABLE),
        )  # fmt: skip
        steps = [state.get("step") for state in states]
        if (
            layout != self._layout
            or len(steps) != len(self._counts.views)
            or not all(map(is_, steps, self._counts.views))
        ):
            states = self._adopt(operands._replace(gradients=gradients), tensors)
            self._layout = layout
        done = self._counts.on_host()
        variants = self._variants(states, groups, done)
        options = [[*group, *group.values(), *self._switches] for group in self.param_groups]
        plan = next((plan for plan in self._plans if plan.variants == variants), None)
        if (
            plan is None
            or not (plan.same_options(options) or self._same_chains(plan))
            or not plan.gather(states)
        ):
            self._plans = [other for other in self._plans if other is not plan][: PLANS - 1]
            plan = self._make_plan(operands._replace(gradients=gradients), tensors, variants, done)
            self._plans.insert(0, plan)
        plan.options, plan.tensors, plan.states = options, tensors, states
        plan.absent = self._absent(operands) if len(self.state) > len(parameters) else []
        for batch in plan.batches:
            self._fill(batch, tensors, gradients, groups, done)
        return plan

    def _absent(self, operands: Operands) -> list[tuple[Tensor, dict[str, Any]]]:
        """Returns the local tensors and states of the other parameters that have been stepped before."""
        present = set(map(id, operands.parameters))
        parameters = (p for group in self.param_groups for p in group["params"])
        return [
            (memory_layout.local(p), self.state[p])
            for p in parameters
            if id(p) not in present and p in self.state
        ]

    def _adopt(self, operands: Operands, tensors: list[Tensor]) -> list[dict[str, Any]]:
        """Checks parameters that no step has seen like this, and lets their step counts share tensors."""
        self._plans, self._layout = [], None
        parameters, gradients, groups, _ = operands
        for tensor, gradient in zip(tensors, gradients, strict=True):
            memory_layout.check(tensor, gradient)
        memory_layout.check_apart(tensors, gradients)
        for group, dtype in dict.fromkeys(zip(groups, (t.dtype for t in tensors), strict=True)):
            self.chain(self.param_groups[group], dtype)  # refuses unsupported options
        states = [self.state[p] for p in parameters]
        # torch's SGD saves no step: where there is momentum, the first step is behind it.
        counts = [float(s.get("step", s.get("momentum_buffer") is not None)) for s in states]
        capturable = [bool(self.param_groups[group].get("capturable")) for group in groups]
        devices = [t.device if device else None for t, device in zip(tensors, capturable, strict=True)]
        self._counts = Counts(counts, devices)
        for state, view in zip(states, self._counts.views, strict=True):
            state["step"] = view
        return states

    def _variants(
        self, states: list[dict[str, Any]], groups: list[int], done: list[float]
    ) -> Variant | list[Variant]:
        """Returns the variant of all parameters, or that of each where they differ."""
        name = BACKUP.name
        backups = [name in state for state in states] if self.reads_backups else [False] * len(states)
        if not self._overriding["due"] and len(set(backups)) == 1:
            return (backups[0],)
        kinds = list(zip(groups, done, backups, strict=True))
        variants = {kind: self._variant(*kind) for kind in dict.fromkeys(kinds)}
        different = set(variants.values())
        return different.pop() if len(different) == 1 else [variants[kind] for kind in kinds]

    def _variant(self, group: int, done: float, backup: bool) -> Variant:
        options, step = self.param_groups[group], int(done) + 1
        always = bool(options.get("capturable"))
        due = (always or component.due(options, step) for component in self._overriding["due"])
        return backup, *due

    def _make_plan(
        self, operands: Operands, tensors: list[Tensor], variants: Variant | list[Variant], done: list[float]
    ) -> Plan:
        """Makes missing state, also for stages that are not due yet, and sorts parameters into batches."""
        parameters, gradients, groups, streams = operands
        each = variants if isinstance(variants, list) else [variants] * len(parameters)
        kinds = [(group, t.dtype, variant) for group, t, variant in zip(groups, tensors, each, strict=True)]
        chains = {kind: self.chain(self.param_groups[kind[0]], *kind[1:]) for kind in dict.fromkeys(kinds)}
        complete = {kind[:2]: self.chain(self.param_groups[kind[0]], kind[1]) for kind in chains}
        states = [self.state[p] for p in parameters]
        new = []
        for p, state, stream, kind in zip(parameters, states, streams, kinds, strict=True):
            chain = complete[kind[:2]]
            weight = state[BACKUP.name] if kind[2][0] else p
            buffers = {}
            for buffer in (*chain.buffers, *chains[kind].buffers):
                if (value := state.get(buffer.name)) is not None:
                    buffers[buffer.name] = fitted(buffer, p, value)
                elif buffer.name not in buffers:
                    dtype, group = self.buffer_dtype(chain, buffer, p), self.param_groups[kind[0]]
                    buffers[buffer.name] = init_buffer(buffer, weight, stream, dtype, self._components, group)
            new.append(buffers)
        for state, buffers in zip(states, new, strict=True):
            state.update(buffers)
        capturable = [bool(group.get("capturable")) for group in self.param_groups]
        batches = sort_into_batches(
            parameters, tensors, gradients, states, streams, kinds, chains, capturable
        )
        for batch in batches:
            group = self.param_groups[next(iter(batch.groups))]  # all groups of a batch have the same chain
            components = self._due(batch.variant)
            first = batch.positions[0]
            step = self._counts.views[first].double() + 1 if batch.capturable else int(done[first]) + 1
            staged = staged_components(components, group, batch.device, step)
            batch.scalar_components = [c for c in staged if c in self._overriding["step_scalars"]]
            batch.key_components = [c for c in staged if c in self._overriding["rng_keys"]]
            if batch.chain.storage.rng_keys:
                batch.storages = [c for c in components if c.storage(group, batch.dtypes[0]) is not None]
            batch.device_scalars = [s for c in staged for s in c.device_scalars(batch.device)]
        return Plan(variants, batches, sum(p.numel() for p in parameters))

    def _due(self, variant: Variant | None) -> list[Component]:
        """Returns the components that take part in a variant."""
        if variant is None:
            return list(self._components)
        _, *due_flags = variant
        periodic = zip(self._overriding["due"], due_flags, strict=bool(due_flags))
        absent = [component for component, due in periodic if not due]
        return [component for component in self._components if component not in absent]

    def chain(self, group: dict[str, Any], dtype: torch.dtype, variant: Variant | None = None) -> Chain:
        """Returns the stages and the storage for parameters of a dtype in a group.

        Args:
            group: The group.
            dtype: The dtype.
            variant: Which periodic components take part; by default all.

        Raises:
            ValueError: If the group has unsupported options, or two components set the storage.
        """
        self._check_group(group)
        due = self._due(variant)
        storages = [s for component in due if (s := component.storage(group, dtype)) is not None]
        if len(storages) > 1:
            raise ValueError(f"only one component may say how weights are stored, got {storages}")
        stages = tuple(stage for component in due if (stage := component.stage(group)) is not None)
        storage = storages[0] if storages else PLAIN
        return Chain(stages, from_backup(storage) if variant and variant[0] else storage)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuses a group with unsupported options."""

    def _same_chains(self, plan: Plan) -> bool:
        """Returns whether the options of groups still ask for the chains of a plan."""
        return all(
            self.chain(self.param_groups[index], batch.dtypes[0], batch.variant) == batch.chain
            and bool(self.param_groups[index].get("capturable")) == batch.capturable
            for batch in plan.batches
            for index in batch.groups
        )

    def buffer_dtype(self, chain: Chain, buffer: Buffer, parameter: Tensor) -> torch.dtype:
        """Returns the dtype of a buffer of a parameter."""
        return buffer_dtype(chain, buffer, parameter, self._state_dtype)

    def _fill(
        self, batch: PlannedBatch, tensors: list[Tensor], gradients: list[Tensor],
        groups: list[int], done: list[float],
    ) -> None:  # fmt: skip
        """Fills a batch with the tensors of this step, and the numbers of all (group, step) among them."""
        originals = batch.select(tensors)
        gradients = batch.select(gradients)
        batch.parameters = originals
        if not batch.dense:
            batch.parameters = list(map(memory_layout.with_strides, originals, batch.strides))
            pairs = zip(originals, batch.parameters, strict=True)
            batch.copies = [(original, dense) for original, dense in pairs if original is not dense]
        if not (batch.dense and all(map(Tensor.is_contiguous, gradients))):
            gradients = list(map(memory_layout.with_strides, gradients, batch.strides))
        batch.gradients = gradients
        if batch.key_components or batch.storages:
            seed = self.seed
            batch.rng_keys = [key for component in batch.key_components for key in component.rng_keys(seed)]
            batch.rng_keys += [
                key for component in batch.storages for key in component.storage_rng_keys(seed)
            ]
        if batch.capturable:
            batch.rows = list(range(len(batch.positions)))
            batch.steps, batch.step_scalars = self._device_step_scalars(batch, groups)
            return
        if len(set(done)) == 1:
            batch.rows, rows = batch.owners, [(group, int(done[0]) + 1) for group in batch.groups]
        else:
            each = [(groups[i], int(done[i]) + 1) for i in batch.positions]
            numbers = {row: number for number, row in enumerate(dict.fromkeys(each))}
            batch.rows, rows = [numbers[row] for row in each], list(numbers)
        batch.steps = [step for _, step in rows]
        batch.step_scalars = [
            [
                number
                for component in batch.scalar_components
                for number in component.step_scalars(self.param_groups[group], step)
            ]
            for group, step in rows
        ]

    def _device_step_scalars(self, batch: PlannedBatch, groups: list[int]) -> tuple[Tensor, Tensor]:
        """Returns step counts and step scalars of each parameter, computed on the device in double."""
        steps = torch.stack([self._counts.views[i] for i in batch.positions]).double() + 1
        step_scalars = steps.new_empty(
            len(batch.positions), sum(stage.step_scalars for stage in batch.chain.stages)
        )
        for group in batch.groups:
            members = [row for row, i in enumerate(batch.positions) if groups[i] == group]
            # Parameters of a group follow each other.
            rows = slice(members[0], members[-1] + 1)
            numbers = (
                number
                for component in batch.scalar_components
                for number in component.step_scalars(self.param_groups[group], steps[rows])
            )
            for column, number in enumerate(numbers):
                if isinstance(number, Tensor):
                    step_scalars[rows, column] = number
                else:
                    step_scalars[rows, column].fill_(number)
        return steps.long(), step_scalars.to(batch.compute)

    # Copies ---------------------------------------------------------------------------------------------

    _KEPT: tuple[str, ...] = ("_components", "_overriding", "_seed", "_state_dtype", "reads_backups")

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles keep the components, too."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._KEPT}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and pickles make their plans anew."""
        super().__setstate__(state)
        self.reset_cache()
