"""Weights of 16 bits: nothing small is lost, and a remainder makes them exact."""

import io
import math

import pytest
import torch
from torch.nn import Parameter

import fastreg
from fastreg.reference.storage import read_split

MODES = ("stochastic", "remainder")


def train(dtype, steps, lr, weight_decay, noise=0.0, make=fastreg.AdamW, **options):
    """The norm of weights that only decay, or are pushed around by noise as well."""
    generator = torch.Generator().manual_seed(0)
    weight = Parameter(torch.randn(4096, generator=generator).to(dtype))
    optimizer = make([weight], lr=lr, weight_decay=weight_decay, **options)
    start = float(weight.detach().double().norm())
    for _ in range(steps):
        weight.grad = noise * torch.randn(4096, generator=generator, dtype=torch.float32).to(dtype)
        optimizer.step()
    return float(weight.detach().double().norm()) / start


@pytest.mark.slow(dtype=torch.float16)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_weight_decay_is_not_lost(mode, dtype):
    shrink = train(dtype, 2000, 1e-3, 0.1, bf16=mode)
    assert shrink == pytest.approx((1 - 1e-4) ** 2000, rel=0.01)


def test_rounding_to_nearest_loses_it():
    assert train(torch.bfloat16, 2000, 1e-3, 0.1, bf16="nearest") == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_weight_decay_beside_noisy_gradients(mode):
    """|w| with decay over |w| without, in bfloat16 as in float32: 0.82; rounded to nearest it is 0.98."""

    def ratio(dtype, **options):
        run = [train(dtype, 2000, 1e-4, decay, noise=1.0, **options) for decay in (1.0, 0.0)]
        return run[0] / run[1]

    expected = ratio(torch.float32)
    assert expected == pytest.approx(math.exp(-0.2), rel=0.02)
    assert ratio(torch.bfloat16, bf16=mode) == pytest.approx(expected, rel=0.02)


RULES = {
    "adamw": (fastreg.AdamW, {"weight_decay": 0.1}),
    "amsgrad": (fastreg.Adam, {"weight_decay": 0.1, "amsgrad": True}),
    "sgd": (fastreg.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "lion": (fastreg.Lion, {"weight_decay": 0.1}),
}


def pair(sizes=((33,), (4, 5), (), (0,), (4099,))):
    """bfloat16 parameters, and the same in float32."""
    generator = torch.Generator().manual_seed(0)
    narrow = [Parameter(torch.randn(size, generator=generator).bfloat16()) for size in sizes]
    return narrow, [Parameter(p.detach().float()) for p in narrow]


def gradients(narrow, wide, turn):
    generator = torch.Generator().manual_seed(turn)
    for p, q in zip(narrow, wide, strict=True):
        p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        q.grad = p.grad.float()


def combined(optimizer, parameter):
    return read_split(parameter.detach(), optimizer.state[parameter]["remainder"])


@pytest.mark.slow(backend=("compiled", "triton"), rule=("amsgrad", "sgd"))
@pytest.mark.parametrize("rule", RULES)
def test_remainder_is_a_float32_run(rule, backend):
    """Bit for bit, with everything that goes along with it, and across a checkpoint."""
    make, options = RULES[rule]

    def made(params, **more):
        components = [fastreg.ClipNorm(math.inf), fastreg.EMA(0.9)]
        return make(params, lr=1e-3, regularizers=components, seed=5, **options, **more)

    narrow, wide = pair()
    optimizer, exact = made(narrow, bf16="remainder"), made(wide)
    for turn in range(6):
        if turn == 3:
            file = io.BytesIO()
            torch.save((optimizer.state_dict(), [p.detach() for p in narrow]), file)
            file.seek(0)
            saved, weights = torch.load(file, weights_only=True)
            narrow = [Parameter(weight) for weight in weights]
            optimizer = made(narrow, bf16="remainder")
            optimizer.load_state_dict(saved)
        gradients(narrow, wide, turn)
        optimizer.step()
        exact.step()
    for p, q in zip(narrow, wide, strict=True):
        assert torch.equal(combined(optimizer, p), q.detach())
        assert torch.equal(p.detach(), q.detach().bfloat16()) or backend == "triton" or ties(q)
        state, expected = optimizer.state[p], exact.state[q]
        assert state["remainder"].dtype == torch.int16 and state.keys() == expected.keys() | {"remainder"}
        for name, value in expected.items():
            assert state[name].dtype == value.dtype and torch.equal(state[name], value)


def ties(wide):
    """Whether a weight lies in the middle between two bfloat16, which are split away from zero."""
    return bool((wide.detach().view(torch.int32) & 0xFFFF == 0x8000).any())


@pytest.mark.slow
def test_stochastic_rounding_is_the_same_everywhere():
    results = []
    for name in ("reference", "compiled", "triton"):
        for dtype in (torch.bfloat16, torch.float16):
            narrow = [Parameter(p.detach().to(dtype)) for p in pair()[0]]
            # Moments in float32: the interpreter truncates what it stores as bfloat16.
            optimizer = fastreg.AdamW(narrow, lr=0.1, state_dtype=torch.float32)
            with fastreg.use_backend(name):
                for turn in range(3):
                    draw = torch.Generator().manual_seed(turn)
                    for p in narrow:
                        p.grad = torch.randn(p.shape, generator=draw).to(dtype)
                    optimizer.step()
            results.append([p.detach() for p in narrow])
    for other in results[2:4], results[4:]:
        for mine, reference in zip(other, results[:2], strict=True):
            assert all(map(torch.equal, mine, reference))


def test_replicas_round_alike_and_steps_differently():
    """Whatever their seeds are: DDP's processes are often seeded apart."""

    def run(seed, steps):
        torch.manual_seed(seed)
        narrow, wide = pair()
        optimizer = fastreg.SGD(narrow, lr=1e-4)
        assert "seed" not in optimizer.param_groups[0]
        for _ in range(steps):
            gradients(narrow, wide, 0)
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in narrow])

    assert torch.equal(run(1, 1), run(2, 1)) and not torch.equal(run(1, 1), run(1, 2))


@pytest.mark.slow(backend="compiled", make=(fastreg.SGD, fastreg.Lion))
@pytest.mark.slow(backend="compiled", state_dtype=(torch.float32, torch.float64))
@pytest.mark.parametrize("make", (fastreg.AdamW, fastreg.SGD, fastreg.Lion))
@pytest.mark.parametrize("state_dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_dtype_of_the_state(make, state_dtype, backend):
    params = [Parameter(torch.ones(20)), Parameter(torch.ones(20, dtype=torch.bfloat16))]
    options = {"momentum": 0.9} if make is fastreg.SGD else {}
    optimizer = make(params, lr=1e-2, state_dtype=state_dtype, **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    moments = [value for state in optimizer.state.values() for n, value in state.items() if n != "step"]
    assert {value.dtype for value in moments} == {state_dtype} and all((p < 1).all() for p in params)
    other = make(params, lr=1e-2, state_dtype=state_dtype, **options)
    other.load_state_dict(optimizer.state_dict())
    assert {v.dtype for state in other.state.values() for n, v in state.items() if n != "step"} == {
        state_dtype
    }


def test_bfloat16_state_follows_the_float32_state():
    generator, results = torch.Generator().manual_seed(0), []
    draws = [torch.randn(1000, generator=generator) for _ in range(20)]
    for state_dtype in (None, torch.bfloat16):
        weight = Parameter(torch.ones(1000))
        optimizer = fastreg.AdamW([weight], lr=1e-2, betas=(0.9, 0.95), state_dtype=state_dtype)
        for draw in draws:
            weight.grad = draw
            optimizer.step()
        results.append(weight.detach())
    assert not torch.equal(*results)
    assert float((results[0] - results[1]).norm()) < 0.02 * float((results[0] - 1).norm())


def test_gradients_narrower_than_weights(backend):
    weight, twin = Parameter(torch.ones(50)), Parameter(torch.ones(50))
    weight.grad_dtype = torch.bfloat16
    optimizer, oracle = fastreg.AdamW([weight], lr=0.1), torch.optim.AdamW([twin], lr=0.1)
    for turn in range(3):
        weight.grad = torch.linspace(-1, 1 + turn, 50).bfloat16()
        twin.grad = weight.grad.float()
        optimizer.step()
        oracle.step()
    torch.testing.assert_close(weight, twin, rtol=0, atol=1e-6)


@pytest.mark.slow(backend="compiled", dtype=torch.float16)
@pytest.mark.slow(backend="compiled", mode=("remainder", "nearest"))
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, which runs the interpreter
@pytest.mark.parametrize("mode", ("stochastic", "remainder", "nearest"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_not_finite_stays_so(mode, dtype, backend):
    """NaN is not rounded to a number, infinity keeps its sign, and float16 overflows to it."""
    weight = Parameter(torch.tensor([1.0, -1.0, 2.0, 3.0, -6e4], dtype=dtype))
    weight.grad = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 6e4], dtype=dtype)
    fastreg.SGD([weight], lr=1.0, bf16=mode).step()
    last = -math.inf if dtype == torch.float16 else -1.2e5
    expected = torch.tensor([math.nan, -math.inf, math.inf, 3.0, last])
    torch.testing.assert_close(weight.detach().float(), expected, equal_nan=True, rtol=0.01, atol=0)


def test_torch_loads_what_has_a_remainder(Race):
    narrow, wide = pair(((5,),))
    optimizer = fastreg.AdamW(narrow, bf16="remainder")
    gradients(narrow, wide, 0)
    optimizer.step()
    theirs = torch.optim.AdamW(narrow)
    theirs.load_state_dict(optimizer.state_dict())
    theirs.step()
    assert narrow[0].isfinite().all()
