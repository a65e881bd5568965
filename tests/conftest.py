"""What the tests share: the rules with their oracles, and the backends."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fastreg
from fastreg.engine import table
from fastreg.engine.batch import Batch, NormSpec
from fastreg.engine.launch import triton as launchers
from fastreg.ops import _elementwise as elementwise
from fastreg.ops import adversarial as adversarial_ops

DEVICE = os.environ.get("FASTREG_TEST_DEVICE")
"""Where kernels run in every test that has CPU tensors, on copies of them: "cuda" on a GPU; "cpu" in the
interpreter, which tests the copying."""


COMPILED = Path(__file__).resolve().parent / "benchmarks"
"""Tests that compile kernels instead of interpreting them, which takes a process of its own."""


class Oracle(torch.optim.Optimizer):
    """Base of oracles that torch has not: options are defaults of the class, `update` steps a parameter."""

    options: dict[str, Any] = {}

    def __init__(self, params, **options):
        super().__init__(params, {"weight_decay": 0.0, **self.options, **options})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, self.state[p], **group)

    def update(self, p, state, **group):
        raise NotImplementedError


class Lion(Oracle):
    """As the paper has it."""

    options = {"lr": 1e-4, "betas": (0.9, 0.99)}

    def update(self, p, state, lr, betas, weight_decay, **group):
        m = state.setdefault("exp_avg", torch.zeros_like(p))
        p.mul_(1 - lr * weight_decay)
        p.sub_(lr * (betas[0] * m + (1 - betas[0]) * p.grad).sign())
        m.mul_(betas[1]).add_((1 - betas[1]) * p.grad)


class Rule(NamedTuple):
    """An optimizer and its oracle, the options that both get, and options for three groups of parameters."""

    ours: type[torch.optim.Optimizer]
    theirs: type[torch.optim.Optimizer]
    options: dict[str, Any]
    groups: tuple[dict[str, Any], ...] = ({"lr": 0.03}, {"weight_decay": 0.5}, {})

    def __call__(self, params: Any, **options: Any) -> torch.optim.Optimizer:
        return self.ours(params, **{**self.options, **options})

    @property
    def drop_in(self) -> bool:
        """Whether ours stands in for the oracle: a subclass, which has all its options."""
        return issubclass(self.ours, self.theirs)

    def oracle(self, params: Any, **options: Any) -> torch.optim.Optimizer:
        return self.theirs(params, **{**self.options, **options})


ADAM_GROUPS = ({"lr": 0.03}, {"weight_decay": 0.5, "amsgrad": True}, {"maximize": True})
ADAMW_GROUPS = ({"lr": 0.03}, {"weight_decay": 0.5, "eps": 1e-3}, {"betas": (0.5, 0.6)})
SGD_GROUPS = ({"lr": 0.03}, {"weight_decay": 0.5}, {"momentum": 0.0, "nesterov": False, "dampening": 0.0})
LION_GROUPS = ({"lr": 0.03}, {"weight_decay": 0.5}, {"betas": (0.5, 0.6)})

# A new optimizer is one row: ours, an oracle, the options of both.
RULES = {
    "adamw": Rule(fastreg.AdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}, ADAMW_GROUPS),
    "adamw-defaults": Rule(fastreg.AdamW, torch.optim.AdamW, {}, ADAMW_GROUPS),
    "adam": Rule(fastreg.Adam, torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}, ADAM_GROUPS),
    "amsgrad": Rule(
        fastreg.AdamW,
        torch.optim.AdamW,
        {"lr": 1e-2, "amsgrad": True, "maximize": True, "weight_decay": 0.1},
        ADAMW_GROUPS,
    ),
    "sgd": Rule(fastreg.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}, SGD_GROUPS),
    "momentum": Rule(
        fastreg.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}, SGD_GROUPS
    ),
    "nesterov": Rule(
        fastreg.SGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        SGD_GROUPS,
    ),
    "lion": Rule(fastreg.Lion, Lion, {"lr": 1e-2, "weight_decay": 0.1}, LION_GROUPS),
}


def pytest_configure(config: pytest.Config) -> None:
    """Let kernels run in Triton's interpreter, except on a GPU and where only tests/benchmarks is run.

    Triton looks at the variable when it is imported, which no test has done yet.  What is compiled for CPUs
    is kept beside pytest's own files, where all workers find it.
    """
    os.environ.setdefault("FASTREG_CACHE_DIR", str(config.rootpath / ".pytest_cache" / "fastreg"))
    compiled = [Path(arg.split("::")[0]).resolve() for arg in config.args]
    if DEVICE != "cuda" and not all(COMPILED in (path, *path.parents) for path in compiled):
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a `slow` with values, such as `slow(backend="compiled")`, only where the test has these values.

    A tuple holds several values of a parameter.
    """
    for item in items:
        values = getattr(getattr(item, "callspec", None), "params", {})
        for mark in [mark for mark in item.own_markers if mark.name == "slow"]:
            if unknown := mark.kwargs.keys() - values.keys():
                raise pytest.UsageError(f"{item.nodeid}: slow names {', '.join(unknown)}, no parameter")
            chosen = {k: v if isinstance(v, tuple) else (v,) for k, v in mark.kwargs.items()}
            if not all(values[name] in options for name, options in chosen.items()):
                item.own_markers.remove(mark)


@pytest.fixture
def rules() -> dict[str, Rule]:
    return RULES


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> Rule:
    return RULES[request.param]


@pytest.fixture(params=("reference", "compiled", "triton"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastreg.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def kernels_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE is None:
        return
    run, partial_norms = launchers.run, launchers.partial_norms
    finish, unit_squares = launchers.clip_factor, launchers.unit_squares

    def run_there(batch: Batch) -> None:
        if batch.device.type != "cpu":
            return run(batch)
        there = moved(batch)
        run(there)
        for mine, theirs in zip(written(batch), written(there), strict=True):
            mine.copy_(theirs)

    def partial_norms_there(batch: Batch, of: NormSpec) -> Tensor:
        if batch.device.type != "cpu":
            return partial_norms(batch, of)
        return partial_norms(moved(batch), of).cpu()

    def finish_there(partial: Tensor, limits: Tensor, largest: bool) -> Tensor:
        return finish(partial.to(DEVICE), limits.to(DEVICE), largest).to(partial.device)

    def unit_squares_there(batch: Batch) -> Tensor:
        return unit_squares(batch) if batch.device.type != "cpu" else unit_squares(moved(batch)).cpu()

    launch_elementwise = elementwise.launch

    def elementwise_there(operator, elements, shared, seed, inner, options, out):
        if out.device.type != "cpu":
            return launch_elementwise(operator, elements, shared, seed, inner, options, out)
        result = there(out)
        first, *others = (None if t is None else there(t) for t in elements)
        elements = [result if elements[0] is out else first, *others]
        shared = [None if t is None else there(t) for t in shared]
        launch_elementwise(operator, elements, shared, there(seed), inner, options, result)
        out.copy_(result)

    launch_step, launch_norm = adversarial_ops.launch_step, adversarial_ops.launch_norm

    def step_there(inputs, ball, bounds, out, master):
        if out.device.type != "cpu":
            return launch_step(inputs, ball, bounds, out, master)
        results = [None if t is None else there(t) for t in (out, master)]
        launch_step(each_there(inputs), ball, None if bounds is None else each_there(bounds), *results)
        for mine, theirs in zip((out, master), results, strict=True):
            if mine is not None:
                mine.copy_(theirs)

    def norm_there(inputs, order, partial):
        if partial.device.type != "cpu":
            return launch_norm(inputs, order, partial)
        result = there(partial)
        launch_norm(each_there(inputs), order, result)
        partial.copy_(result)

    monkeypatch.setattr(adversarial_ops, "launch_step", step_there)
    monkeypatch.setattr(adversarial_ops, "launch_norm", norm_there)
    monkeypatch.setattr(fastreg.runtime.backend, "why_not_triton", lambda device: None)
    monkeypatch.setattr(elementwise, "launch", elementwise_there)
    monkeypatch.setattr(launchers, "unit_squares", unit_squares_there)
    monkeypatch.setattr(launchers, "run", run_there)
    monkeypatch.setattr(launchers, "partial_norms", partial_norms_there)
    monkeypatch.setattr(launchers, "clip_factor", finish_there)


def written(batch: Batch) -> list[Tensor]:
    """What a step writes."""
    return [*batch.parameters, *(tensor for buffer in batch.buffers for tensor in buffer)]


def there(tensor: Tensor) -> Tensor:
    """A copy on the device, which lies as far from a multiple of 16 bytes as the original."""
    skipped = tensor.data_ptr() % 16 // tensor.element_size()
    store = torch.empty(tensor.numel() + 16, dtype=tensor.dtype, device=DEVICE)
    return store.as_strided(tensor.shape, tensor.stride(), skipped).copy_(tensor)


def each_there(parts: Any) -> Any:
    """A named tuple with copies of its tensors on the device."""
    return type(parts)(*(there(part) if isinstance(part, Tensor) else part for part in parts))


def moved(batch: Batch) -> Batch:
    """The batch with copies on the device."""

    there_batch = replace(
        batch,
        parameters=list(map(there, batch.parameters)),
        gradients=list(map(there, batch.gradients)),
        buffers=[list(map(there, buffer)) for buffer in batch.buffers],
        device_scalars=[scalar.to(DEVICE) for scalar in batch.device_scalars],
        skip=None if batch.skip is None else batch.skip.to(DEVICE),
        table=table.Table(),
        memory=None,
        uploaded=False,
    )
    table.upload_changes(there_batch)
    for mine, theirs in zip(
        there_batch.table.units_of(there_batch), batch.table.units_of(batch), strict=True
    ):
        mine.copy_(theirs)
    return there_batch


class Race:
    """Our optimizer and its oracle on equal parameters with equal gradients."""

    def __init__(self, shapes: Sequence[tuple[int, ...]] = ((33,), (4, 5), ()), dtype=torch.float32):
        self.random = torch.Generator().manual_seed(0)
        self.ours = [Parameter(self.draw(shape, dtype)) for shape in shapes]
        self.theirs = [Parameter(p.detach().clone()) for p in self.ours]

    def draw(self, shape: tuple[int, ...], dtype=torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.random, dtype=dtype)

    def gradients(self, *without: int) -> None:
        """New gradients, except for these parameters, which get none."""
        for i, (p, q) in enumerate(zip(self.ours, self.theirs, strict=True)):
            p.grad = None if i in without else self.draw(p.shape, p.dtype)
            q.grad = None if i in without else p.grad.clone()

    def step(self, ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, *without: int) -> None:
        self.gradients(*without)
        ours.step()
        theirs.step()

    def check(self) -> None:
        close(self.ours, self.theirs)


def close(actual: Any, expected: Any) -> None:
    """Equal to 1e-6 of the largest expected element, 1e-12 in float64."""
    if isinstance(actual, Tensor):
        actual, expected = [actual], [expected]
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        if e.numel():
            bound = (1e-12 if e.dtype == torch.float64 else 1e-6) * float(e.detach().abs().max())
            assert float((a.detach().double() - e.detach().double()).abs().max()) <= bound


def same(actual: Tensor, expected: Tensor) -> bool:
    """The same bits; on a GPU, which fuses multiply-adds, equal to 1e-6 of the largest element."""
    if DEVICE in (None, "cpu"):
        return torch.equal(actual, expected)
    bound = 1e-6 * expected.detach().abs().amax() if expected.numel() else 0
    return bool(((actual - expected).abs() <= bound).all())


@pytest.fixture(name="same")
def same_function() -> Callable[[Tensor, Tensor], bool]:
    return same


@pytest.fixture(name="Race")
def race_class() -> type[Race]:
    return Race


@pytest.fixture(name="close")
def close_function() -> Callable[[Any, Any], None]:
    return close
