"""Where elements lie in memory must not change what happens to them."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import fastreg
from fastreg import EMA, ClipNorm

Strides = tuple[int, ...]


def dense(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def strided(values: Tensor, strides: Strides, offset: int = 0) -> Tensor:
    """The values in a storage full of sevens, `offset` elements from its start."""
    needed = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True)) + 1
    storage = torch.full((offset + max(needed, 0) + 3,), 7.0, dtype=values.dtype)
    view = storage.as_strided(values.shape, strides, offset)
    if 0 not in strides:
        view.copy_(values)
    return view


def gaps(view: Tensor) -> Tensor:
    """What lies in the storage of a view, but not in the view."""
    storage = view.detach().as_strided((view.untyped_storage().nbytes() // view.element_size(),), (1,), 0)
    covered = torch.zeros(len(storage), dtype=torch.bool)
    covered.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    return storage[~covered]


LIKE_ADAMW = ("adamw-defaults", "adam", "amsgrad", "sgd", "momentum", "nesterov")
"""Rules that repeat what AdamW and Lion show about layouts."""

# shape, strides of the parameter, strides of the gradient
LAYOUTS = {
    "transposed": ((4, 6), (1, 4), (1, 4)),
    "transposed parameter": ((4, 6), (1, 4), (6, 1)),
    "transposed gradient": ((4, 6), (6, 1), (1, 4)),
    "channels last": ((2, 3, 4, 5), (60, 1, 15, 3), (60, 1, 15, 3)),
    "channels-last gradient": ((2, 3, 4, 5), (60, 20, 5, 1), (60, 1, 15, 3)),
    "permuted": ((3, 4, 5), (1, 15, 3), (20, 1, 4)),
    "gaps": ((5, 3), (10, 2), (3, 1)),
    "gaps in 1-d": ((11,), (3,), (2,)),
    "gaps in the gradient": ((5, 3), (3, 1), (10, 2)),
    "expanded gradient": ((4, 6), (6, 1), (0, 0)),
    "half expanded gradient": ((4, 6), (1, 4), (0, 1)),
    "expanded 1-d gradient": ((9,), (1,), (0,)),
    "size-1 dimensions": ((1, 5, 1, 3), (99, 3, 7, 1), (1, 3, 50, 1)),
    "one element": ((1, 1), (17, 5), (3, 9)),
}


@pytest.mark.slow(offset=3, layout=tuple(LAYOUTS.keys() - {"transposed", "channels last", "gaps"}))
@pytest.mark.parametrize("offset", (0, 3))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, offset, Race, close):
    shape, strides, gradient_strides = LAYOUTS[layout]
    race = Race([shape, (8,)])
    with torch.no_grad():
        race.ours[0] = Parameter(strided(race.ours[0], strides, offset))
    address = race.ours[0].data_ptr()
    ours = fastreg.AdamW(race.ours, lr=0.1, regularizers=[ClipNorm(1.0), EMA(0.5)])
    theirs = torch.optim.AdamW(race.theirs, lr=0.1)
    for _ in range(3):
        race.gradients()
        race.ours[0].grad = strided(race.theirs[0].grad, gradient_strides, offset)
        race.theirs[0].grad = dense(race.ours[0].grad)
        torch.nn.utils.clip_grad_norm_(race.theirs, 1.0)
        ours.step()
        theirs.step()
    race.check()
    assert race.ours[0].stride() == strides and race.ours[0].data_ptr() == address
    assert (gaps(race.ours[0]) == 7).all()
    for name in ("exp_avg", "exp_avg_sq"):
        close(ours.state[race.ours[0]][name], theirs.state[race.theirs[0]][name])


@st.composite
def a_layout(draw):
    """A shape with strides, without overlap, the dimensions in any order and with gaps between them."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    strides, step = [0] * len(shape), 1
    for dim in draw(st.permutations(range(len(shape)))):
        step *= draw(st.sampled_from((1, 1, 1, 2)))
        strides[dim] = step
        step *= max(shape[dim], 1)
    return shape, tuple(strides)


@settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(a_layout(), st.data())
def test_any_layout(backend, Race, layout, data):
    shape, strides = layout
    race = Race([shape, (3,)])
    with torch.no_grad():
        race.ours[0] = Parameter(strided(race.ours[0], strides, data.draw(st.integers(0, 4))))
    order = data.draw(st.permutations(range(len(shape))))
    ours, theirs = fastreg.AdamW(race.ours, lr=0.1), torch.optim.AdamW(race.theirs, lr=0.1)
    for _ in range(2):
        race.gradients()
        race.ours[0].grad = (
            race.theirs[0]
            .grad.permute(order)
            .contiguous()
            .permute([order.index(i) for i in range(len(shape))])
        )
        ours.step()
        theirs.step()
    race.check()
    assert (gaps(race.ours[0]) == 7).all()


@pytest.mark.parametrize("rule", ("adamw", "nesterov"), indirect=True)
def test_views_of_one_buffer(rule, backend, Race):
    """As fully flattened models have them: neither the start nor the length of a view is a multiple of 16."""
    race = Race([(3, 5), (7,), (1,), (2, 2, 2)])
    sizes = [p.numel() for p in race.ours]
    values, slopes = (torch.full((sum(sizes) + 2,), 7.0) for _ in range(2))
    components = zip(values[1:-1].split(sizes), slopes[1:-1].split(sizes), strict=True)
    for i, (p, (component, slope)) in enumerate(zip(race.ours, components, strict=True)):
        race.ours[i] = Parameter(component.view(p.shape).copy_(p.detach()))
        race.ours[i].grad = slope.view(p.shape)
    ours, theirs = rule(race.ours), rule.oracle(race.theirs)
    for _ in range(3):
        for p, q in zip(race.ours, race.theirs, strict=True):
            q.grad = race.draw(q.shape)
            p.grad.copy_(q.grad)
        ours.step()
        theirs.step()
    race.check()
    assert values[0] == values[-1] == 7


def moved(p: Parameter) -> Tensor:
    return p.detach().clone()


REBOUND = {
    "moved": moved,
    "channels last": lambda p: p.detach().clone(memory_format=torch.channels_last),
    "gaps": lambda p: torch.stack((p.detach(), p.detach()), -1)[..., 0],
    "transposed in place": lambda p: p.detach().transpose(2, 3),
}


@pytest.mark.parametrize("rule", ("adamw", "nesterov"), indirect=True)
@pytest.mark.parametrize("change", REBOUND)
def test_data_rebound_between_steps(rule, backend, change, Race):
    race = Race([(2, 3, 4, 4)])
    ours, theirs = rule(race.ours), rule.oracle(race.theirs)
    for _ in range(3):
        race.step(ours, theirs)
        race.ours[0].data = REBOUND[change](race.ours[0])
        race.theirs[0].data = REBOUND[change](race.theirs[0])
        address = race.ours[0].data_ptr()
    race.step(ours, theirs)
    race.check()
    assert race.ours[0].data_ptr() == address


@pytest.mark.parametrize("rule", ("adamw", "nesterov"), indirect=True)
def test_model_to_channels_last(rule, backend, close):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    twin = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    twin.load_state_dict(model.state_dict())
    ours, theirs = rule(model.parameters()), rule.oracle(twin.parameters())
    gradients = torch.Generator().manual_seed(1)
    for step in range(4):
        if step == 2:
            model.to(memory_format=torch.channels_last)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = torch.randn(q.shape, generator=gradients)
            p.grad = torch.empty_like(p).copy_(q.grad)
        ours.step()
        theirs.step()
    assert not model[0].weight.is_contiguous()
    close(list(model.parameters()), list(twin.parameters()))


@pytest.mark.slow(backend="compiled", rule=("adam", "amsgrad", "sgd", "momentum", "nesterov"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)))
def test_half_precision_is_rounded_once(rule, backend, dtype, Race):
    """The result of float32 arithmetic, to the last bit of the narrow dtype (the interpreter truncates)."""
    race = Race([(50,), (3, 4)], dtype)
    wide = [Parameter(p.detach().float()) for p in race.ours]
    ours, theirs = rule(race.ours), rule.oracle(wide)
    race.gradients()
    for p, q in zip(race.ours, wide, strict=True):
        q.grad = p.grad.float()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)  # NumPy, which interprets
        ours.step()
    theirs.step()
    for p, q in zip(race.ours, wide, strict=True):
        rounded = q.detach().to(dtype)
        ulp = (torch.nextafter(rounded, rounded * 4) - rounded).float().abs()
        assert ((p.detach() - rounded).float().abs() <= ulp).all()
        for name, value in theirs.state[q].items():
            if name != "step":
                state = ours.state[p][name]
                assert state.dtype == dtype
                rounded = value.to(dtype)
                ulp = (torch.nextafter(rounded, rounded * 4) - rounded).float().abs()
                assert ((state - rounded).float().abs() <= ulp).all()


@pytest.mark.parametrize("rule", ("adamw", "nesterov"), indirect=True)
def test_gradient_of_another_dtype(rule, backend):
    weight, twin = (Parameter(torch.ones(20)) for _ in range(2))
    weight.grad_dtype = None
    weight.grad = torch.linspace(-3, 3, 20).bfloat16()
    twin.grad = weight.grad.float()
    rule([weight]).step()
    rule.oracle([twin]).step()
    torch.testing.assert_close(weight, twin, rtol=0, atol=1e-6)


SHARED = {
    "twice the same": lambda buffer: (buffer[:8], buffer[:8]),
    "one inside the other": lambda buffer: (buffer[:8], buffer[2:5]),
    "a row of a matrix": lambda buffer: (buffer[:12].view(3, 4), buffer[4:8]),
    "a column of a matrix": lambda buffer: (buffer[:12].view(3, 4), buffer[1:12:4]),
    "another dtype": lambda buffer: (buffer[:4], buffer[2:4].view(torch.float64)),
}
APART = {
    "side by side": lambda buffer: (buffer[:8], buffer[8:]),
    "interleaved": lambda buffer: (buffer[::2], buffer[1::2]),
    "columns": lambda buffer: (buffer.view(8, 2)[:, 0], buffer.view(8, 2)[:, 1]),
    "blocks of a matrix": lambda buffer: (buffer.view(4, 4)[:2, :2], buffer.view(4, 4)[1:, 2:]),
}


@pytest.mark.parametrize("case", SHARED)
def test_parameters_that_share_memory(backend, case):
    """All are updated at once: refused, and nothing has happened."""
    buffer = torch.arange(16.0)
    params = [with_gradient(view) for view in SHARED[case](buffer)]
    optimizer = fastreg.AdamW(params)
    with pytest.raises(ValueError, match=r"parameters of shapes .* share memory"):
        optimizer.step()
    assert torch.equal(buffer, torch.arange(16.0)) and not optimizer.state


def test_gradients_that_lie_in_parameters(backend):
    """Shifted they are refused: a block may be written before another reads it.  In place they are fine."""
    buffer = torch.arange(1.0, 21.0)
    weight, other = Parameter(buffer[:8]), with_gradient(torch.ones(3))
    weight.grad = buffer[1:9]
    optimizer = fastreg.SGD([weight, other], lr=0.5)
    with pytest.raises(
        ValueError, match=r"a gradient of shape \(8,\) shares memory with a parameter of shape"
    ):
        optimizer.step()
    assert torch.equal(buffer, torch.arange(1.0, 21.0)) and not optimizer.state
    weight.grad = weight.detach()
    optimizer.step()
    assert torch.equal(buffer[:8], torch.arange(1.0, 9.0) / 2) and buffer[8] == 9
    weight.grad = buffer[12:]
    optimizer.step()
    assert torch.equal(buffer[:8], torch.arange(1.0, 9.0) / 2 - torch.arange(13.0, 21.0) / 2)


@pytest.mark.parametrize("case", APART)
def test_parameters_that_only_lie_close(backend, case, close):
    ours, theirs = torch.arange(16.0), torch.arange(16.0)
    params = [with_gradient(view) for view in APART[case](ours)]
    others = [with_gradient(view) for view in APART[case](theirs)]
    optimizer, oracle = fastreg.AdamW(params, lr=0.1), torch.optim.AdamW(others, lr=0.1, foreach=False)
    for _ in range(3):
        optimizer.step()
        oracle.step()
    close(ours, theirs)


@pytest.mark.slow(rule=LIKE_ADAMW)
@pytest.mark.parametrize("size", (1, 5))
def test_gradients_that_are_views_which_negate(rule, backend, size, close):
    """The imaginary part of a conjugate: memory holds numbers of the other sign."""
    waves = torch.randn(size, dtype=torch.complex64)
    ours, theirs = (Parameter(torch.ones(size)) for _ in range(2))
    ours.grad, theirs.grad = waves.conj().imag, -waves.imag
    assert ours.grad.is_neg()
    for p in (ours, theirs):
        rule([p], seed=0).step()
    close(ours, theirs)


@pytest.mark.slow(rule=("adam", "adamw-defaults", "momentum"))
@pytest.mark.slow(rule="amsgrad", layout=("contiguous", "gaps", "conjugate gradient", "scalar"))
@pytest.mark.slow(rule="sgd", layout=("contiguous", "transposed", "conjugate gradient", "scalar"))
@pytest.mark.slow(rule="nesterov", layout=("transposed", "gaps", "conjugate gradient", "scalar"))
@pytest.mark.slow(rule="lion", layout=("contiguous", "transposed", "gaps", "scalar"))
@pytest.mark.parametrize("layout", ("contiguous", "transposed", "gaps", "conjugate gradient", "scalar"))
def test_complex_parameters(rule, backend, layout, close):
    """As pairs of real numbers, in any layout, with everything that goes along."""
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(4, 6, generator=generator, dtype=torch.complex64)

    views = {
        "transposed": lambda t: t.t(),
        "gaps": lambda t: t[:, ::2],
        "scalar": lambda t: t[1, 1].clone(),
    }
    view = views.get(layout, lambda t: t)
    start = draw()
    ours, theirs = Parameter(view(start.clone())), Parameter(view(start.clone()).contiguous())
    optimizer = rule([ours], regularizers=[ClipNorm(1.0), EMA(0.5)])
    oracle = rule.oracle([theirs] if rule.drop_in else [as_real(theirs)])
    for _ in range(3):
        gradient = view(draw())
        ours.grad = gradient.conj() if layout == "conjugate gradient" else gradient
        norm = ours.grad.resolve_conj().abs().square().sum().sqrt()
        clipped = ours.grad.resolve_conj() * min(1.0, 1 / (float(norm) + 1e-6))
        (target,) = oracle.param_groups[0]["params"]
        target.grad = clipped.contiguous() if rule.drop_in else torch.view_as_real(clipped)
        optimizer.step()
        oracle.step()
        assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-6)
    (target,) = oracle.param_groups[0]["params"]
    expected = torch.view_as_real(target.detach()) if rule.drop_in else target.detach()
    close(torch.view_as_real(ours.detach().contiguous()), expected)
    assert optimizer.state[ours]["ema"].dtype == torch.complex64
    other = rule([ours], regularizers=[ClipNorm(1.0), EMA(0.5)])
    other.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(other.state[ours][name], value) for name, value in optimizer.state[ours].items())
    for name, value in other.state[ours].items():
        other.state[ours][name] = value.clone(memory_format=torch.contiguous_format)
    ours.grad = view(draw()) / 100
    target.grad = ours.grad.contiguous() if rule.drop_in else torch.view_as_real(ours.grad).clone()
    other.step()
    oracle.step()
    expected = torch.view_as_real(target.detach()) if rule.drop_in else target.detach()
    close(torch.view_as_real(ours.detach().contiguous()), expected)


def as_real(parameter: Parameter) -> Parameter:
    return Parameter(torch.view_as_real(parameter.detach()).clone())


def sparse() -> Parameter:
    weight = Parameter(torch.ones(4, 2))
    weight.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (4, 2), check_invariants=True)
    return weight


def outgrown() -> Parameter:
    weight = Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    weight.data = torch.ones(9)
    return weight


def with_gradient(values: Tensor) -> Parameter:
    weight = Parameter(values)
    weight.grad = torch.ones(weight.shape, dtype=weight.dtype)
    return weight


REFUSED = {
    "expanded": (lambda: with_gradient(torch.ones(3, 1).expand(3, 4)), ValueError, r"\(1, 0\).*contiguous"),
    "overlapping": (
        lambda: with_gradient(torch.ones(8).as_strided((3, 4), (2, 1))),
        ValueError,
        r"\(2, 1\).*contiguous",
    ),
    "sparse": (sparse, RuntimeError, "sparse_coo.*SparseAdam"),
    "outgrown": (outgrown, RuntimeError, r"gradient.*\(2,\).*\(9,\)"),
}


@pytest.mark.slow(rule=LIKE_ADAMW)
@pytest.mark.parametrize("case", REFUSED)
def test_refused(rule, backend, case):
    """And nothing has happened when it is."""
    make, error, message = REFUSED[case]
    good, bad = with_gradient(torch.ones(5)), make()
    optimizer = rule([good, bad])
    with pytest.raises(error, match=message):
        optimizer.step()
    assert (good == 1).all()
    bad.grad = None
    optimizer.step()
    assert optimizer.state[good]["step"] == 1 and (good != 1).all()
