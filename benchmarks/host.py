"""What a step costs the host: Python and launches, over tensors too small to cost anything else.

Without a GPU both sides launch nothing: ours goes through Triton's own launch path to a driver that does
nothing, and torch's fused kernel is replaced by a function that does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.nn import Parameter

import fastreg

from . import peers
from .suite import OURS, Case, Check, Unavailable

ELEMENTS = 8


@dataclass
class Workload:
    """Tiny parameters; what has been launched instead of kernels."""

    params: list[Parameter]
    launches: list[Any] = field(default_factory=list)
    stubs: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def launched(self) -> int:
        """How much has been launched since the last call."""
        count = len(self.launches)
        self.launches.clear()
        return count


@dataclass(eq=False)  # hashed by identity
class HostCase(Case):
    """AdamW over many tiny tensors: the time until `step()` returns."""

    count: int
    rounds: int
    suite: str = "host"
    baseline: str = "torch fused"
    chain: str = "AdamW"

    def __post_init__(self) -> None:
        self.name = f"{self.chain}, {self.count} tiny tensors, Python and launch"

    def setup(self, device: torch.device) -> Workload:
        workload = Workload(_tiny(self.count, device))
        if device.type == "cpu":
            try:
                from triton import knobs

                from .stub import stub_driver
            except ImportError as error:
                raise Unavailable(f"needs triton: {error}") from None
            if knobs.runtime.interpret:
                raise Unavailable("the interpreter launches nothing: unset TRITON_INTERPRET")
            workload.launches = workload.stubs.enter_context(stub_driver())
            nothing = mock.patch("torch._fused_adamw_", lambda *_, **__: workload.launches.append("fused"))
            workload.stubs.enter_context(nothing)
        return workload

    def teardown(self, workload: Workload) -> None:
        workload.stubs.close()

    def contenders(self) -> dict[str, Callable[[Workload], Any]]:
        """Ours, and torch's fewest launches."""
        build = {OURS: peers.fastreg_step, self.baseline: peers.fused}
        return {name: partial(self._build, make) for name, make in build.items()}

    def _build(self, make: peers.Build, workload: Workload) -> peers.Step:
        return make(self.chain, workload.params, 1.0)

    def verify(self, name: str, workload: Workload, run: Any) -> list[Check]:
        """One launch a step on either side, and every step counted."""
        steps = 3
        workload.launched()
        for _ in range(steps):
            run()
        counted = max(abs(float(run.optimizer.state[p]["step"]) - steps) for p in workload.params)
        checks = [Check("step count", counted, 0)]
        if workload.params[0].device.type == "cpu":
            checks.append(Check("launches", abs(workload.launched() - steps), 0))
        return checks

    def details(self, workload: Workload, run: Any) -> dict[str, Any]:
        workload.launched()
        return {}


@dataclass(eq=False)  # hashed by identity
class PerTensorCase(Case):
    """The CPU's own path over many tiny tensors: what a tensor costs beyond its elements."""

    count: int
    rounds: int
    suite: str = "host"
    baseline: str = "torch fused"

    def __post_init__(self) -> None:
        self.name = f"AdamW, {self.count} tiny tensors, CPU"

    def setup(self, device: torch.device) -> Workload:
        workload = Workload(_tiny(self.count, device))
        if not fastreg.backend.has_compiler():
            raise Unavailable("needs a C++ compiler")
        workload.stubs.enter_context(fastreg.use_backend("compiled"))
        return workload

    def teardown(self, workload: Workload) -> None:
        workload.stubs.close()

    def contenders(self) -> dict[str, Callable[[Workload], Any]]:
        """Ours compiled, and torch's fused loop in C++."""
        return {
            OURS: lambda workload: peers.fastreg_step("AdamW", workload.params, 1.0),
            self.baseline: lambda workload: peers.fused("AdamW", workload.params, 1.0),
        }

    def verify(self, name: str, workload: Workload, run: Any) -> list[Check]:
        """The first step of AdamW from ones with gradients of one: w · (1 - lr · λ) - lr, but for eps."""
        with torch.no_grad():
            for p in workload.params:
                p.fill_(1.0)
        run()
        expected = 1 - peers.LR * peers.WEIGHT_DECAY - peers.LR
        return [
            Check("weights", max(float((p.detach() - expected).abs().max()) for p in workload.params), 1e-6)
        ]

    def details(self, workload: Workload, run: Any) -> dict[str, Any]:
        return {"tensors": self.count}


def _tiny(count: int, device: torch.device) -> list[Parameter]:
    made = [Parameter(torch.ones(ELEMENTS, device=device)) for _ in range(count)]
    for p in made:
        p.grad = torch.ones_like(p)
    return made


def cases(device: torch.device, quick: bool) -> list[Case]:
    """As many tensors as GPT-2 has, and a thousand."""
    turns = 100 if quick else 300
    found: list[Case] = [HostCase(count, turns) for count in (148, 1000)]
    if device.type == "cpu":
        found += [PerTensorCase(count, turns) for count in (148, 1000)]
    return found
