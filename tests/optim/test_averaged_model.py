"""AveragedModel: against torch's, against closed forms, and its checkpoints."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import fastreg
from fastreg.optim.averaged_model import AveragedModel, get_ema_multi_avg_fn

from .averaged_cases import FUNCTIONS, Net, about_functions, batch, moving, trained


@about_functions
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_equals_torch(function, dtype, backend, close):
    net = Net().to(dtype)
    ours = AveragedModel(net, **FUNCTIONS[function]())
    theirs = swa_utils.AveragedModel(net, **FUNCTIONS[function]())
    for _ in trained(net, 4):
        ours.update_parameters(net)
        theirs.update_parameters(net)
    actual, expected = ours.state_dict(), theirs.state_dict()
    assert list(actual) == list(expected)
    close(list(actual.values()), list(expected.values()))
    assert not torch.equal(ours.module.first.weight, net.first.weight)
    assert isinstance(ours, swa_utils.AveragedModel) and int(ours.n_averaged) == 4
    x = batch(9, dtype)
    close(ours.eval()(x), theirs.eval()(x))


def floats(net: Any) -> nn.ParameterList:
    tensors = (net.norm.running_mean, net.norm.running_var, net.scale, net.first.weight)
    return nn.ParameterList([nn.Parameter(t.detach().clone()) for t in tensors])


@about_functions
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_buffers_are_averaged(function, dtype, close):
    """Those that are whole numbers are copied; what is not saved is averaged like the others."""
    net = Net().to(dtype)
    ours = AveragedModel(net, use_buffers=True, **FUNCTIONS[function]())
    theirs = swa_utils.AveragedModel(floats(net).float(), **FUNCTIONS[function]())
    for turn in trained(net, 4):
        net.scale.fill_(turn)
        ours.update_parameters(net)
        theirs.update_parameters(floats(net).float())
    if dtype == torch.float32:
        close(list(floats(ours.module)), list(theirs.parameters()))
    else:
        names = ("norm.running_mean", "norm.running_var", "scale", "first.weight")
        close([ours.averages.get_buffer(name) for name in names], list(theirs.parameters()))
        assert "averages.norm.running_mean" in ours.state_dict()
        assert "averages.scale" not in ours.state_dict()
    assert int(ours.module.norm.num_batches_tracked) == 4
    assert not torch.equal(ours.module.norm.running_mean, net.norm.running_mean)


# Closed forms: weights 0.9^t.


def powers(backend: str, times: range, **options: Any) -> float:
    net = nn.ParameterList([nn.Parameter(torch.ones(3, dtype=torch.float64))])
    average = AveragedModel(net, **options)
    for t in times:
        net[0].data.fill_(0.9**t)
        average.update_parameters(net)
    values = average.module[0].detach()
    assert (values == values[0]).all()
    return float(values[0])


def test_mean_of_powers(backend):
    expected = (1 - 0.9**10) / (10 * 0.1)
    assert powers(backend, range(10)) == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(0.65132156, rel=1e-8)


def test_ema_of_powers(backend):
    d, r, n = 0.5, 0.9, 10
    expected = d**n + (1 - d) * r * (r**n - d**n) / (r - d)
    result = powers(backend, range(n + 1), multi_avg_fn=get_ema_multi_avg_fn(d))
    assert result == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(0.3921411748, rel=1e-9)


@pytest.mark.parametrize("decay", (0.0, 1.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_extreme_decays(decay, dtype, backend):
    """The latest weights, and the first: to the bit."""
    net = nn.ParameterList([torch.ones(3, dtype=dtype)])
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for value in (1.0, 0.9, 0.3, 0.7, 0.1):
        net[0].data.fill_(value)
        average.update_parameters(net)
    assert torch.equal(average.module[0], net[0] if decay == 0 else torch.ones_like(net[0]))


# Narrow weights.


def narrow(
    value: float, shape: tuple[int, ...] = (5,), dtype: torch.dtype = torch.bfloat16
) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.full(shape, value, dtype=dtype))])


def rounds(narrow: Tensor, exact: Tensor, backend: str) -> bool:
    """To nearest; Triton's interpreter truncates to bfloat16."""
    if backend == "triton" and narrow.dtype == torch.bfloat16:
        return bool(((narrow.float() - exact).abs() <= torch.finfo(narrow.dtype).eps * exact.abs()).all())
    return torch.equal(narrow, exact.to(narrow.dtype))


@pytest.mark.parametrize("options", ({}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9999)}), ids=("swa", "ema"))
def test_constant_weights_stay_the_same_bits(options):
    net = nn.ParameterList([torch.randn(100, generator=torch.Generator().manual_seed(0)).bfloat16()])
    average = AveragedModel(net, **options)
    with fastreg.use_backend("reference"):
        for _ in range(1000):
            average.update_parameters(net)
    assert torch.equal(average.module[0], net[0])
    assert torch.equal(average.averages.get_buffer("0"), net[0].detach().float())


@pytest.mark.parametrize("decay, expected", ((0.999, 1.999955), (0.9999, 1.632139)))
def test_averages_of_narrow_weights_do_not_stall(decay, expected):
    """From 1 towards 2, within what 10,000 roundings of float32 may sum up to."""
    net, updates = narrow(1.0), 10_000
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))
    average.update_parameters(net)
    net[0].data.fill_(2)
    with fastreg.use_backend("reference"):
        for _ in range(updates):
            average.update_parameters(net)
    result = average.averages.get_buffer("0")
    assert result.dtype == torch.float32
    assert float((result - expected).abs().max()) <= updates * 2**-24 + 1e-6
    assert torch.equal(average.module[0], result.bfloat16())
    assert average.module[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("function", ["equal weights", "ema", "torch's ema", "a function"])
def test_narrow_models_have_the_averages_of_wide_ones(function, dtype, backend, close):
    net, wide = Net().to(dtype), Net()
    ours = AveragedModel(net, **FUNCTIONS[function]())
    theirs = swa_utils.AveragedModel(wide, **FUNCTIONS[function]())
    for _ in trained(net, 4):
        ours.update_parameters(net)
        wide.load_state_dict(net.state_dict())
        theirs.update_parameters(wide)
    for name, expected in theirs.module.named_parameters():
        result = ours.averages.get_buffer(name)
        close(result, expected)
        assert rounds(ours.module.get_parameter(name), result, backend)
    assert torch.equal(ours.module.norm.running_mean, net.norm.running_mean)
    assert ours(batch(9, dtype)).dtype == dtype


def test_rounded_averages_wherever_they_lie(backend):
    """A buffer that is not dense cannot be written in the pass."""
    net = nn.Module()
    net.register_buffer("part", torch.randn(6, 8).bfloat16()[:, :5])
    net.register_buffer("turned", torch.randn(6, 8).bfloat16().t())
    average = AveragedModel(net, use_buffers=True)
    for _ in range(3):
        average.update_parameters(net)
        net.part.add_(1)
        net.turned.mul_(2)
    for name in ("part", "turned"):
        result = average.averages.get_buffer(name)
        assert rounds(average.module.get_buffer(name), result, backend)
    assert not torch.equal(average.module.part, net.part)


def test_what_autograd_saved_of_rounded_averages_is_out_of_date(backend):
    net = nn.Linear(3, 2).bfloat16()
    average = AveragedModel(net)
    average.update_parameters(net)
    x = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    loss = average(x).sum()
    average.update_parameters(net)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_casts_keep_what_is_known():
    net = narrow(1.0)
    average = AveragedModel(net)
    for value in (1.0, 1.0, 1.0078125):
        net[0].data.fill_(value)
        average.update_parameters(net)
    precise = average.averages.get_buffer("0").clone()
    assert not torch.equal(precise, precise.bfloat16().float())
    average.half()
    assert torch.equal(average.averages.get_buffer("0"), precise)
    assert average.module[0].dtype == torch.float16
    average.float()
    assert torch.equal(average.module[0], precise) and "averages.0" not in average.state_dict()
    average.bfloat16()
    average.update_parameters(net)
    expected = precise + (1.0078125 - precise) / 4
    torch.testing.assert_close(average.averages.get_buffer("0"), expected, rtol=0, atol=1e-6)


# What surrounds updates.


def test_moved_weights_are_found(backend):
    """As by `module.to(device)`, or loading with `assign=True`."""
    for dtype in (torch.float32, torch.bfloat16):
        net = narrow(1.0, dtype=dtype)
        average = AveragedModel(net)
        average.update_parameters(net)
        average.module[0].data = average.module[0].data.clone()
        net[0].data.fill_(2)
        average.update_parameters(net)
        assert (average.module[0] == 1.5).all()
        average.module[0] = nn.Parameter(average.module[0].detach().clone())
        net[0].data.fill_(3)
        average.update_parameters(net)
        assert (average.module[0] == 2).all()


@pytest.mark.parametrize("duplicate", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_copies_go_on_by_themselves(duplicate, dtype):
    net = Net().to(dtype)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    for turn in trained(net, 4):
        average.update_parameters(net)
        if turn == 2:
            other = duplicate(average)
    before = {name: value.clone() for name, value in average.state_dict().items()}
    assert other.multi_avg_fn.decay == 0.75
    other.update_parameters(net)
    for state in (other.state_dict(), average.state_dict()):
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], value) for name, value in before.items())


def averaged(
    dtype: torch.dtype, turns: int = 3, kind: Any = AveragedModel, tied: bool = True
) -> tuple[nn.Module, Any]:
    net = Net(tied).to(dtype)
    average = kind(net)
    for _ in trained(net, turns):
        average.update_parameters(net)
    return net, average


@pytest.mark.parametrize("assign", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_checkpoint_goes_on_with_the_same_bits(dtype, assign):
    net, average = averaged(dtype, tied=not assign)  # torch unties what it assigns
    saved = {name: value.clone() for name, value in average.state_dict().items()}
    other = AveragedModel(Net(tied=not assign).to(dtype))
    other.load_state_dict(saved, assign=assign)
    net.first.weight.data.add_(1)
    for model in (average, other):
        model.update_parameters(net)
    assert all(torch.equal(other.state_dict()[n], value) for n, value in average.state_dict().items())


def test_checkpoints_of_torch_and_for_torch(close):
    net, theirs = averaged(torch.float32, kind=swa_utils.AveragedModel)
    ours = AveragedModel(Net())
    ours.load_state_dict(theirs.state_dict())
    back = swa_utils.AveragedModel(Net())
    back.load_state_dict(ours.state_dict())
    net.first.weight.data.add_(1)
    for model in (theirs, ours, back):
        model.update_parameters(net)
    close(list(ours.parameters()), list(theirs.parameters()))
    close(list(back.parameters()), list(theirs.parameters()))


@pytest.mark.parametrize("assign", (False, True))
def test_a_narrow_checkpoint_of_torch_starts_the_averages(assign):
    _, theirs = averaged(torch.bfloat16, kind=swa_utils.AveragedModel)
    ours = AveragedModel(Net().bfloat16())
    ours.load_state_dict(theirs.state_dict(), assign=assign)
    assert int(ours.n_averaged) == 3
    for name, weight in theirs.module.named_parameters():
        assert torch.equal(ours.averages.get_buffer(name), weight.detach().float())
    back = swa_utils.AveragedModel(Net().bfloat16())
    wrong = back.load_state_dict(ours.state_dict(), strict=False)
    assert not wrong.missing_keys and all(key.startswith("averages.") for key in wrong.unexpected_keys)
    assert all(map(torch.equal, back.parameters(), theirs.parameters()))


def test_a_narrow_checkpoint_for_a_wide_model():
    _, average = averaged(torch.bfloat16)
    wide = AveragedModel(Net())
    wide.load_state_dict(average.state_dict())
    for name, weight in wide.module.named_parameters():
        assert torch.equal(weight, average.averages.get_buffer(name))


def test_what_does_not_fit_is_not_loaded():
    _, average = averaged(torch.bfloat16, 1)
    state = average.state_dict()
    del state["module.first.bias"], state["averages.first.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"module.first.bias", "averages.first.bias"'):
        AveragedModel(Net().bfloat16()).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"module.other"'):
        AveragedModel(Net()).load_state_dict(
            {**AveragedModel(Net()).state_dict(), "averages.other": torch.ones(1)}
        )


def test_inside_another_module():
    _, average = averaged(torch.bfloat16)
    outer = nn.ModuleDict({"average": average})
    other = nn.ModuleDict({"average": AveragedModel(Net().bfloat16())})
    state = {name: value for name, value in outer.state_dict().items() if "averages" not in name}
    assert len(state) < len(outer.state_dict())
    other.load_state_dict(state)
    assert torch.equal(
        other["average"].averages.get_buffer("first.weight"), average.module.first.weight.detach().float()
    )
    other.load_state_dict(outer.state_dict())
    assert all(torch.equal(other.state_dict()[n], value) for n, value in outer.state_dict().items())


def test_with_the_schedule_of_torch(close):
    """SWALR from the second turn on, as the example of torch has it."""
    results = []
    for kind in (AveragedModel, swa_utils.AveragedModel):
        net = Net()
        optimizer = fastreg.SGD(net.parameters(), lr=0.1)
        average, schedule = kind(net), swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        for turn in range(5):
            optimizer.zero_grad()
            net(batch(turn)).square().mean().backward()
            optimizer.step()
            if turn > 1:
                average.update_parameters(net)
                schedule.step()
        swa_utils.update_bn([batch(1), batch(2)], average)
        results.append(list(average.state_dict().values()))
    close(*results)


def test_integers_complex_numbers_and_nothing_at_all(backend, close):
    net = nn.Module()
    net.whole = nn.Parameter(torch.arange(3), requires_grad=False)
    net.waves = nn.Parameter(torch.randn(4, 2, dtype=torch.complex64))
    net.none = nn.Parameter(torch.empty(0, 3))
    average = AveragedModel(net)
    theirs = swa_utils.AveragedModel(nn.ParameterList([net.waves]))
    for _ in range(3):
        average.update_parameters(net)
        theirs.update_parameters(nn.ParameterList([net.waves]))
        net.waves.data.mul_(1 + 1j)
        net.whole.data.add_(1)
    close(torch.view_as_real(average.module.waves.detach()), torch.view_as_real(theirs.module[0].detach()))
    assert torch.equal(average.module.whole, torch.arange(3) + 2)
    AveragedModel(nn.ReLU()).update_parameters(nn.ReLU())


def test_layouts_that_differ(backend, close):
    """The averages keep the layout that the model had."""
    net = nn.Conv2d(3, 4, 3)
    average, theirs = AveragedModel(net), swa_utils.AveragedModel(net)
    for _ in range(3):
        net.to(memory_format=torch.channels_last)
        net.weight.data.add_(torch.randn(4, 3, 3, 3))
        for model in (average, theirs):
            model.update_parameters(net)
    close(list(average.parameters()), list(theirs.parameters()))


@pytest.mark.parametrize("name", ("compiled", "triton"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
def test_backends_give_the_same_bits(name, dtype, same):
    averages = []
    for backend in ("reference", name):
        generator = torch.Generator().manual_seed(0)
        shapes = [(1,), (127,), (33, 65), (), (0,), (2 * 4096 + 17,)]
        net = nn.ParameterList([torch.randn(shape, generator=generator).to(dtype) for shape in shapes])
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        with fastreg.use_backend(backend):
            for _ in range(4):
                average.update_parameters(net)
                for p in net:
                    p.data.copy_(torch.randn(p.shape, generator=generator))
        averages.append(average)
    expected, result = averages
    prefix = "averages" if dtype.itemsize == 2 else "module"
    for key, value in expected.state_dict().items():
        assert not key.startswith(prefix) or same(result.state_dict()[key], value), key
    for p, average in zip(result.module, result.averages.buffers(), strict=False):
        assert rounds(p, average, name)


def test_one_pass(monkeypatch):
    """However many tensors there are: one batch for what is wide, one for what is narrow."""
    net = nn.ModuleList(
        [*(nn.Linear(3, 3) for _ in range(5)), *(nn.Linear(3, 3).bfloat16() for _ in range(5))]
    )
    batches = []
    run = fastreg.engine.launch.run
    monkeypatch.setattr(
        fastreg.engine.launch, "run", lambda batch: (batches.append(len(batch.parameters)), run(batch))
    )
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(net)
    assert batches == [10, 10]


# Wrong arguments.


def test_wrong_arguments():
    net = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got \[1\]"):
        AveragedModel([1])
    with pytest.raises(TypeError, match=r"avg_fn must be callable such as .*, got 0.9"):
        AveragedModel(net, avg_fn=0.9)
    with pytest.raises(TypeError, match=r"multi_avg_fn must be callable such as .*, got 0.9"):
        AveragedModel(net, multi_avg_fn=0.9)
    with pytest.raises(ValueError, match="only one of avg_fn and multi_avg_fn"):
        AveragedModel(net, avg_fn=moving, multi_avg_fn=get_ema_multi_avg_fn())
    for decay in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"decay must be in \[0, 1\], got decay={decay}"):
            get_ema_multi_avg_fn(decay)
    assert repr(get_ema_multi_avg_fn()) == "get_ema_multi_avg_fn(0.999)"


@pytest.mark.parametrize(
    "make, message",
    (
        (lambda: nn.Linear(2, 2, bias=False), "the model has 1 parameters and buffers, its averages 2"),
        (lambda: nn.Linear(3, 2), r"the model has \(2, 3\), torch.float32 where its average has \(2, 2\)"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), r"the model has \(2, 2\), torch.complex64 where"),
    ),
)
def test_another_model(make, message):
    average = AveragedModel(nn.Linear(2, 2))
    before = {name: value.clone() for name, value in average.state_dict().items()}
    with pytest.raises(ValueError, match=f"{message}.*pass the model that AveragedModel was made from"):
        average.update_parameters(make())
    assert all(torch.equal(average.state_dict()[name], value) for name, value in before.items())
