"""The noise of private steps: its distribution, what it depends on, and that none is used twice."""

import copy
import math
import pickle

import pytest
import torch
from scipy import stats

import fastreg
from fastreg.common.random import Purpose, key
from fastreg.privacy import BookKeeping, DPOptimizer
from fastreg.privacy.noise import STEPS, NoiseKey, PrivateNoise
from fastreg.reference import random as reference_random
from fastreg.reference import regularizers as reference

pytestmark = pytest.mark.filterwarnings("ignore:noise_seed")

N = 10**6
SIGMA, C = 0.7, 3.0


def private(shapes, dtype=torch.float32, make=fastreg.SGD, seed=7, **options):
    """An optimizer over zeros whose batches are empty: what comes out is noise."""
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad_sample = None
    settings = {"noise_multiplier": SIGMA, "max_grad_norm": C, "loss_reduction": "sum", "noise_seed": seed}
    return params, DPOptimizer(make(params, lr=1.0), **{**settings, **options})


def drawn(shapes=((N,),), steps=1, backend="reference", **options):
    """What each step has added to each parameter, negative."""
    params, optimizer = private(shapes, **options)
    noise = []
    with fastreg.use_backend(backend):
        for _ in range(steps):
            optimizer.step()
            optimizer.zero_grad()
            noise.append([-p.detach().clone() for p in params])
            for p in params:
                p.data.zero_()
    return noise


def uncorrelated(a, b):
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return abs(float((a * b).mean() / (a.std() * b.std()))) < 4 / math.sqrt(len(a))


@pytest.fixture(scope="module")
def draws():
    """A million, from a fixed key."""
    return drawn()[0][0].double() / (SIGMA * C)


def test_standard_deviation(draws):
    """σ · C to 0.28 %, four standard errors: a noise that is 1 % off would not pass."""
    error = 4 / math.sqrt(2 * N)
    assert abs(float(draws.std()) - 1) < error < 0.003
    assert not abs(float((draws * 1.01).std()) - 1) < error


def test_mean_shape_and_symmetry(draws):
    assert abs(float(draws.mean())) < 4 / math.sqrt(N)
    assert abs(float((draws**3).mean())) < 4 * math.sqrt(15 / N)
    assert abs(float((draws**4).mean()) - 3) < 4 * math.sqrt(96 / N)
    assert stats.kstest(draws.numpy(), "norm").pvalue > 1e-3


def test_neighbours_do_not_depend_on_each_other(draws):
    """Box–Muller makes normals in pairs, Philox words in fours."""
    assert uncorrelated(draws[1:], draws[:-1]) and uncorrelated(draws[1:].square(), draws[:-1].square())
    quads = draws.view(-1, 4)
    for power in (1, 2):
        correlation = torch.corrcoef(quads.pow(power).T) - torch.eye(4)
        assert correlation.abs().max() < 4.5 / math.sqrt(N / 4)


def test_tensors_steps_and_keys_do_not_depend_on_each_other():
    """Also tensors of equal shapes."""
    n = 200_000
    first, second = drawn([(n,), (n,)], steps=2)
    ((other, _),) = drawn([(n,), (n,)], seed=8)
    noise = [*first, *second, other]
    assert all(uncorrelated(a, b) for i, a in enumerate(noise) for b in noise[:i])
    assert not uncorrelated(first[0], drawn([(n,)])[0][0])


def test_tails(monkeypatch):
    """The smallest uniform there is gives 9.4 standard deviations; a clamp at 1e-7 would end at 5.7."""
    words = lambda *_: (torch.zeros(8, dtype=torch.int64),) * 4  # noqa: E731
    monkeypatch.setattr(reference_random, "words", words)
    largest = drawn([(32,)])[0][0].abs().max() / (SIGMA * C)
    assert largest > 9.4


def test_is_that_of_the_reference():
    """(key, step, parameter, element), the step a count of the optimizer's own."""
    at = reference_random.PhiloxPosition(0, 0, 1, 2)
    expected = reference_random.normal(key(7, Purpose.PRIVACY), at, torch.empty(33))
    noise = drawn([(5,), (33,)], steps=3)[2][1]
    torch.testing.assert_close(noise, SIGMA * C * expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 2**16 - 1, 2**16, 2**16 + 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_count_has_noise_of_its_own(count, dtype):
    """The count travels in two halves, which float32 holds exactly."""
    component = PrivateNoise(NoiseKey(7))
    with component.authorize_step(1.0, 1.0, count):
        *_, low, high = (torch.tensor(number, dtype=dtype) for number in component.step_scalars({}, 1))
    u, one = torch.zeros(16, dtype=dtype), torch.ones((), dtype=dtype)
    at = reference_random.PhiloxPosition(0, 0, 3, 99)
    word = torch.tensor(component.noise.key)
    _, noise, _ = reference.private_noise(u, u, at, word, one, one, low, high)
    expected = reference_random.normal(component.noise.key, at._replace(step=count), u)
    assert torch.equal(noise, expected.to(dtype))


@pytest.mark.parametrize(
    "backend, make",
    [
        pytest.param("compiled", fastreg.SGD, marks=pytest.mark.slow),
        ("triton", fastreg.AdamW),
        ("triton", fastreg.SGD),
    ],
)
def test_backends_give_the_same_bits(backend, make, same):
    shapes = [(33, 7), (4096 + 19,), ()]
    options = {"make": make, "loss_reduction": "mean", "expected_batch_size": 17}
    for a, b in zip(drawn(shapes, 2, **options), drawn(shapes, 2, backend, **options), strict=True):
        assert all(map(same, a, b))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("make", [fastreg.SGD, torch.optim.SGD])
def test_of_narrow_weights_is_float32(backend, make):
    """Noise in bfloat16 would have a few thousand values: it is rounded after it was added."""
    if make is fastreg.SGD:
        make = lambda params, lr: fastreg.SGD(params, lr, bf16="nearest")  # noqa: E731
    wide, narrow = (
        drawn([(2000,)], 1, backend, dtype=dtype, make=make)[0][0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert narrow.dtype == torch.bfloat16
    assert ((narrow.float() - wide).abs() <= 2.0**-7 * wide.abs()).all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_fused_and_written_noise_are_the_same(backend, close):
    shapes = [(33, 7), (19,), ()]
    fused, written, torchs = (
        drawn(shapes, 2, backend, **options)
        for options in ({}, {"materialize_grad": True}, {"make": torch.optim.SGD})
    )
    for a, b, c in zip(fused, written, torchs, strict=True):
        close(b, a)
        close(c, a)


# Keys and counts


def test_key_comes_from_the_operating_system():
    keys = set()
    for _ in range(20):
        torch.manual_seed(0)
        keys.add(NoiseKey().key)
    assert len(keys) == 20 and all(-(2**63) <= k < 2**63 for k in keys)


def test_the_seed_of_the_optimizer_has_no_part_in_it():
    def noise(torch_seed, optimizer_seed):
        torch.manual_seed(torch_seed)
        p = torch.nn.Parameter(torch.zeros(8))
        p.grad_sample = None
        optimizer = DPOptimizer(
            fastreg.SGD([p], 1.0, seed=optimizer_seed), loss_reduction="sum", noise_seed=3
        )
        optimizer.step()
        return p.detach()

    assert torch.equal(noise(0, 0), noise(1, 1))


def test_a_seed_warns():
    with pytest.warns(UserWarning, match="predictable"):
        NoiseKey(3)


@pytest.mark.filterwarnings("error")
def test_no_seed_does_not_warn():
    NoiseKey()


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda noise: pickle.loads(pickle.dumps(noise))]
)
def test_copies_have_a_key_of_their_own(copied):
    noise = NoiseKey()
    noise.advance()
    assert copied(noise).key != noise.key and copied(noise).count == 0
    kept = NoiseKey(reproducible=True)
    kept.advance()
    assert (copied(kept).key, copied(kept).count) == (kept.key, 1)


def test_ends_before_it_repeats():
    noise = NoiseKey()
    noise.count = STEPS - 1
    assert noise.advance() == STEPS - 1
    with pytest.raises(OverflowError, match="renew"):
        noise.advance()
    noise.renew()
    assert noise.advance() == 0


def test_counts_steps_that_fail(monkeypatch):
    """What a failed step may have shown is not used again."""
    params, optimizer = private([(64,)])
    monkeypatch.setattr(fastreg.engine.launch, "run", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    monkeypatch.undo()
    optimizer.step()
    assert torch.equal(params[0].detach(), -drawn([(64,)], steps=2)[1][0])


def test_counts_steps_that_a_device_skips():
    """A sum that is not finite, which the base optimizer is told to skip."""
    params, optimizer = private([(64,)], make=lambda ps, lr: fastreg.SGD(ps, lr, nonfinite="skip"))
    optimizer._source.accumulate = lambda parameters: None
    params[0].summed_grad = torch.full((64,), math.nan)
    optimizer.step()
    assert not params[0].any()
    optimizer.step()
    assert torch.equal(params[0].detach(), -drawn([(64,)], steps=2)[1][0])


def test_accumulating_draws_none():
    """However a batch is split, its noise is the same."""
    params, optimizer = private([(64,)])
    optimizer.signal_skip_step()
    optimizer.step()
    optimizer.accumulate()
    assert not params[0].any()
    optimizer.step()
    assert torch.equal(params[0].detach(), -drawn([(64,)])[0][0])


def test_inner_optimizer_cannot_step_by_itself():
    params, optimizer = private([(4,)])
    params[0].grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="not private"):
        optimizer.base_optimizer.step()
    optimizer.detach().step()
    assert torch.equal(params[0].detach(), -torch.ones(4))


def test_bookkeeping_is_exported():
    assert fastreg.privacy.BookKeeping is BookKeeping
