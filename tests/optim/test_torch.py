"""PyTorch's own inputs, error inputs and properties of optimizers, from `torch.testing`, hold for ours."""

import copy
import functools
import io
import re

import pytest
import torch
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import fastreg

OPTIMIZERS = {"Adam": fastreg.Adam, "AdamW": fastreg.AdamW, "SGD": fastreg.SGD}
INFOS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in OPTIMIZERS}
# The inputs for "cuda" are those for "cpu" and `capturable=True`, which ours can do anywhere.
INPUTS = [
    pytest.param(name, inputs, id=f"{name}, {inputs.desc}")
    for name, info in INFOS.items()
    for inputs in info.optim_inputs_func(device="cuda", dtype=torch.float32)
]


def test_all_are_there():
    assert INFOS.keys() == OPTIMIZERS.keys() and len(INPUTS) >= 29
    assert sum("capturable" in p.values[1].kwargs for p in INPUTS) >= 10


def parameters(dtype=torch.float32):
    """Three parameters, one of which never gets a gradient, as torch's own tests have them."""
    generator = torch.Generator().manual_seed(0)
    made = [
        Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in ((10, 4), (5,), (2,))
    ]
    for p in made[:2]:
        p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
    return made


def options(inputs, **changes):
    return {**copy.deepcopy(inputs.kwargs), **changes}


def theirs(name, inputs, params):
    """torch's optimizer with the same input, as numbers: its capturable form runs on accelerators only."""
    kwargs = {k: v for k, v in options(inputs).items() if k != "capturable"}
    if "lr" in kwargs:
        kwargs["lr"] = float(kwargs["lr"])
    if "betas" in kwargs:
        kwargs["betas"] = tuple(map(float, kwargs["betas"]))
    return INFOS[name].optim_cls(params, **kwargs)


def train(optimizer, params, steps=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params[:2]:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    return [p.detach() for p in params]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "backend, dtype",
    [
        ("reference", torch.float32), ("compiled", torch.float32), ("triton", torch.float32),
        ("reference", torch.float64), ("reference", torch.complex64),
        slow("compiled", torch.float64), slow("compiled", torch.complex64),
        slow("triton", torch.float64), slow("triton", torch.complex64),
    ],
    indirect=["backend"], ids=str,
)  # fmt: skip
@pytest.mark.parametrize(("name", "inputs"), INPUTS)
def test_inputs(name, inputs, backend, dtype, close):
    ours, expected = parameters(dtype), parameters(dtype)
    optimizer, oracle = OPTIMIZERS[name](ours, **options(inputs)), theirs(name, inputs, expected)
    result, wanted = train(optimizer, ours), train(oracle, expected)
    real = torch.view_as_real if dtype.is_complex else torch.Tensor.detach
    close(list(map(real, result)), list(map(real, wanted)))
    for p, q in zip(ours[:2], expected[:2], strict=True):
        for key, value in oracle.state[q].items():
            mine = optimizer.state[p][key]
            assert mine.dtype == value.dtype and mine.shape == value.shape
            close(real(mine) if mine.is_complex() else mine, real(value) if value.is_complex() else value)
    assert ours[2] not in optimizer.state


def error_inputs():
    for name, info in INFOS.items():
        for inputs in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
            yield pytest.param(name, inputs, id=f"{name}, {inputs.optimizer_error_input.desc}")


@pytest.mark.parametrize(("name", "inputs"), list(error_inputs()))
def test_error_inputs(name, inputs):
    wrong = inputs.optimizer_error_input
    params = [Parameter(torch.ones(2))] if wrong.params is None else wrong.params
    assert inputs.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    expected = pytest.warns if issubclass(inputs.error_type, Warning) else pytest.raises
    with expected(inputs.error_type, match=inputs.error_regex):
        OPTIMIZERS[name](params, **wrong.kwargs)


def schedulers():
    for name, info in INFOS.items():
        for i, chain in enumerate(info.scheduler_inputs):
            yield pytest.param(name, chain, id=f"{name}, {i}")


@pytest.mark.parametrize("backend", ["reference", slow("compiled"), slow("triton")], indirect=True)
@pytest.mark.parametrize(("name", "chain"), list(schedulers()))
def test_schedulers_go_in_the_right_direction(name, chain, backend):
    """torch's test of the Rosenbrock-like problem: with every scheduler, loss falls and equals torch's."""
    losses = []
    for make in (OPTIMIZERS[name], functools.partial(INFOS[name].optim_cls, foreach=False)):
        torch.manual_seed(0)
        weight, bias = Parameter(torch.randn(10, 5)), Parameter(torch.randn(10))
        inputs = torch.randn(5)
        optimizer = make([weight, bias], lr=0.01)
        schedules = [scheduler(optimizer) for scheduler in chain]
        history = []

        def closure(optimizer=optimizer, weight=weight, bias=bias, inputs=inputs):
            optimizer.zero_grad()
            loss = (weight.mv(inputs) + bias).pow(2).sum()
            loss.backward()
            return loss

        for _ in range(20):
            history.append(optimizer.step(closure).item())
            for schedule in schedules:
                if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    schedule.step(history[-1])
                else:
                    schedule.step()
        losses.append(history)
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6, abs=1e-6 * losses[1][0])


@pytest.mark.parametrize(("name", "inputs"), INPUTS)
def test_no_gradients_is_no_step(name, inputs):
    params = parameters()
    for p in params:
        p.grad = None
    optimizer = OPTIMIZERS[name](params, **options(inputs))
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(map(torch.equal, params, before)) and not optimizer.state


@pytest.mark.parametrize(("name", "inputs"), INPUTS)
def test_zero_gradients_change_nothing_without_decay(name, inputs):
    params = parameters()[:2]
    for p in params:
        p.grad.zero_()
    optimizer = OPTIMIZERS[name](params, **options(inputs, weight_decay=0))
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize(("name", "inputs"), INPUTS)
def test_state_dict_is_deterministic_and_resumes(name, inputs, close):
    """Also through disk with `weights_only`, into an optimizer made with nothing but defaults."""
    params = parameters()
    optimizer = OPTIMIZERS[name](params, **options(inputs))
    train(optimizer, params, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = [Parameter(p.detach().clone()) for p in params]
    flags = {"capturable": True} if "capturable" in inputs.kwargs else {}
    twin = OPTIMIZERS[name](twins, **flags)
    twin.load_state_dict(torch.load(file, weights_only=True))
    train(optimizer, params, 3)
    train(twin, twins, 3)
    assert all(map(torch.equal, params, twins))
    assert all(
        torch.equal(optimizer.state[p][key], twin.state[q][key])
        for p, q in zip(params[:2], twins[:2], strict=True)
        for key in optimizer.state[p]
    )


@pytest.mark.parametrize(("name", "inputs"), INPUTS)
def test_older_state_dicts_load(name, inputs):
    """Checkpoints from before a flag existed take its default."""
    params = parameters()
    optimizer = OPTIMIZERS[name](params, **options(inputs))
    train(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for flag in INFOS[name].not_og_supported_flags:
        for group in saved["param_groups"]:
            group.pop(flag, None)
    optimizer.load_state_dict(saved)
    train(optimizer, params, 2)
    assert optimizer.state[params[0]]["step"] == 4


@pytest.mark.parametrize("name", ("Adam", "AdamW"))
def test_steps_that_are_no_tensors_load(name):
    params = parameters()
    optimizer = OPTIMIZERS[name](params)
    train(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    optimizer.load_state_dict(saved)
    train(optimizer, params, 1)
    step = optimizer.state[params[0]]["step"]
    assert isinstance(step, torch.Tensor) and step.shape == () and step == 3


@pytest.mark.parametrize(("name", "inputs"), INPUTS)
def test_copies(name, inputs):
    """torch's test: deepcopy keeps all public attributes and the groups."""
    params = parameters()
    optimizer = OPTIMIZERS[name](params, **options(inputs))
    train(optimizer, params, 2)
    copied = copy.deepcopy(optimizer)
    public = {k for k in dir(optimizer) if not k.startswith("_")}
    assert public == {k for k in dir(copied) if not k.startswith("_")}
    assert repr(copied) == repr(optimizer)


@pytest.mark.parametrize(("name", "inputs"), INPUTS)
def test_printed_as_torch_prints_it(name, inputs):
    ours = OPTIMIZERS[name](parameters(), **options(inputs))
    plain = INFOS[name].optim_cls(parameters(), **options(inputs))
    assert repr(ours) == repr(plain)
    assert re.match(rf"{name} \(\nParameter Group 0", repr(ours))
    assert ours.param_groups[0].keys() == plain.param_groups[0].keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_named_parameters_load_into_unnamed_and_back(name):
    model = torch.nn.Linear(3, 2)
    named, plain = OPTIMIZERS[name](model.named_parameters()), OPTIMIZERS[name](model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    named.step()
    plain.load_state_dict(named.state_dict())
    assert plain.param_groups[0]["param_names"] == ["weight", "bias"]
    other = OPTIMIZERS[name](model.named_parameters())
    other.load_state_dict(OPTIMIZERS[name](model.parameters()).state_dict())
    assert other.param_groups[0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_profiler_names(name):
    params = parameters()
    optimizer = OPTIMIZERS[name](params)
    with torch.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.name for event in profile.events()]
    assert names.count(f"Optimizer.step#{name}.step") == 1
    assert names.count(f"Optimizer.zero_grad#{name}.zero_grad") == 1


def test_classes_relate_as_torchs_do():
    assert issubclass(fastreg.AdamW, fastreg.Adam) and issubclass(fastreg.AdamW, torch.optim.AdamW)
    assert issubclass(fastreg.Adam, torch.optim.Adam) and not issubclass(fastreg.Adam, torch.optim.AdamW)
    assert issubclass(fastreg.SGD, torch.optim.SGD)


def test_decoupled_weight_decay_makes_adam_adamw(close):
    results = []
    for make in (fastreg.Adam, torch.optim.Adam):
        params = parameters()
        results.append(train(make(params, weight_decay=0.3, decoupled_weight_decay=True, lr=0.1), params))
    close(*results)
