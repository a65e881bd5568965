"""Times a step on the host, Python and launches, over tensors so small that nothing else takes time.

On a CPU, `HostCase` launches no kernels.  fastreg goes through Triton's own launch path to a driver that
launches nothing, and torch's fused kernel is replaced by a function that does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest import mock

import torch
from torch.nn import Parameter

import fastreg

from . import peers
from .suite import OURS, Case, Check, Unavailable

ELEMENTS = 8


@dataclass
class Workload:
    """Tiny parameters, the launches recorded instead of made, and the patches that do this."""

    params: list[Parameter]
    launches: list[Any] = field(default_factory=list)
    stubs: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


@dataclass(eq=False)  # hashed by identity
class TinyCase(Case):
    """AdamW over many tiny tensors."""

    count: int
    rounds: int
    what: ClassVar[str]
    suite: str = "host"
    baseline: str = "torch fused"

    def __post_init__(self) -> None:
        self.name = f"AdamW, {self.count} tiny tensors, {self.what}"

    def setup(self, device: torch.device) -> Workload:
        params = [Parameter(torch.ones(ELEMENTS, device=device)) for _ in range(self.count)]
        for p in params:
            p.grad = torch.ones_like(p)
        return Workload(params)

    def teardown(self, workload: Workload) -> None:
        workload.stubs.close()

    def contenders(self) -> dict[str, Callable[[Workload], Any]]:
        """Returns fastreg's step, and torch's fused step, which makes the fewest launches."""
        return {
            OURS: lambda workload: peers.fastreg_step("AdamW", workload.params, 1.0),
            self.baseline: lambda workload: peers.fused("AdamW", workload.params, 1.0),
        }


class HostCase(TinyCase):
    """AdamW over tiny tensors until `step()` returns: Python and launches."""

    what = "Python and launch"

    def setup(self, device: torch.device) -> Workload:
        workload = super().setup(device)
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

    def verify(self, name: str, workload: Workload, run: Any) -> list[Check]:
        """Takes three steps and checks that each is counted and, on a CPU, makes one launch."""
        steps = 3
        workload.launches.clear()
        for _ in range(steps):
            run()
        counted = max(abs(float(run.optimizer.state[p]["step"]) - steps) for p in workload.params)
        checks = [Check("step count", counted, 0)]
        if workload.params[0].device.type == "cpu":
            checks.append(Check("launches", abs(len(workload.launches) - steps), 0))
        return checks


class PerTensorCase(TinyCase):
    """AdamW over tiny tensors by the compiled CPU backend: the time of a tensor besides its elements."""

    what = "CPU"

    def setup(self, device: torch.device) -> Workload:
        workload = super().setup(device)
        if not fastreg.runtime.backend.has_compiler():
            raise Unavailable("needs a C++ compiler")
        workload.stubs.enter_context(fastreg.use_backend("compiled"))
        return workload

    def verify(self, name: str, workload: Workload, run: Any) -> list[Check]:
        """Compares the weights after a step, where both they and gradients were 1, with 1 - lr · λ - lr.

        eps is left out, since it matters less than the bound.
        """
        with torch.no_grad():
            for p in workload.params:
                p.fill_(1.0)
        run()
        expected = 1 - peers.LR * peers.WEIGHT_DECAY - peers.LR
        off = max(float((p.detach() - expected).abs().max()) for p in workload.params)
        return [Check("weights", off, 1e-6)]

    def details(self, workload: Workload, run: Any) -> dict[str, Any]:
        return {"tensors": self.count}


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Returns cases of 148 tensors, as many as GPT-2 has, and of a thousand."""
    turns = 100 if quick else 300
    result: list[Case] = [HostCase(count, turns) for count in (148, 1000)]
    if device.type == "cpu":
        result += [PerTensorCase(count, turns) for count in (148, 1000)]
    return result
