"""The operator of noise: what it draws, its derivatives, and all that torch does with an operator."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastreg
from fastreg.nn import ActivationNoise, functional
from fastreg.ops import noise as noise_ops
from fastreg.reference.noise import KINDS

pytestmark = pytest.mark.usefixtures("reference")
N = 2**18


def noisy(x, kind="additive", std=0.3, seed=1):
    """Adds noise with the seed pinned."""
    torch.manual_seed(seed)
    return functional.gaussian_noise(x, std, kind=kind)


def moments(z):
    """Each in units of its standard error, for N standard normals."""
    z, n = z.double(), z.numel()
    return [
        float(z.mean()) * math.sqrt(n),
        float(z.square().mean() - 1) * math.sqrt(n / 2),
        float((z**3).mean()) * math.sqrt(n / 15),
        float((z**4).mean() - 3) * math.sqrt(n / 96),
        float((z.abs() > 2).double().mean() - math.erfc(2 / math.sqrt(2))) * math.sqrt(n / (0.0455 * 0.9545)),
    ]


def test_additive_noise_is_normal():
    z = noisy(torch.full((N,), 3.0)) - 3.0
    assert max(map(abs, moments(z / 0.3))) < 5


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_multiplicative_noise_has_the_moments_of_dropout(p):
    """Mean 1 and variance p / (1 - p)  (Srivastava et al. 2014, §10)."""
    std = math.sqrt(p / (1 - p))
    factors = noisy(torch.full((N,), 2.0), "multiplicative", std) / 2
    assert max(map(abs, moments((factors - 1) / std))) < 5


def test_uniform_noise_is_uniform():
    torch.manual_seed(3)
    u = functional.uniform_noise(torch.zeros(N), 0.5).double() / 0.5
    assert float(u.abs().max()) < 1 and abs(float(u.mean())) * math.sqrt(3 * N) < 5
    assert abs(float(u.square().mean() - 1 / 3)) * math.sqrt(N * 45 / 4) < 5
    counts = torch.histc(u, 64, -1, 1)
    assert float((counts - N / 64).abs().max()) < 5 * math.sqrt(N / 64)


def test_two_calls_know_nothing_of_each_other():
    """Nor neighbours of each other, at any lag."""
    torch.manual_seed(4)
    a, b = (functional.gaussian_noise(torch.zeros(N), 1.0) for _ in range(2))
    assert abs(float((a * b).sum())) < 5 * math.sqrt(N)
    for lag in (*range(1, 10), *(2**k for k in range(4, 18))):
        assert abs(float((a[:-lag] * a[lag:]).sum())) < 5 * math.sqrt(N - lag), lag


def test_known_answer():
    """So that no release changes what a seed means."""
    for kind, expected in KNOWN.items():
        actual = noise_ops.noise(torch.ones(4), torch.tensor(1234567), torch.tensor(1.0), 1, kind)
        assert torch.equal(actual, torch.tensor(expected))


KNOWN = {
    "additive": [1.9540977478027344, 1.1493432521820068, -0.04834187030792236, 1.201512098312378],
    "multiplicative": [1.9540977478027344, 1.1493432521820068, -0.04834187030792236, 1.201512098312378],
    "uniform": [1.7205657958984375, 1.2546234130859375, 1.0146942138671875, 0.0494232177734375],
}


def test_torch_rules_the_seeds(x):
    assert torch.equal(noisy(x), noisy(x)) and not torch.equal(noisy(x, seed=2), noisy(x))
    torch.manual_seed(9)
    first, second = functional.gaussian_noise(x), functional.gaussian_noise(x)
    assert not torch.equal(first, second)
    torch.manual_seed(9)
    with torch.random.fork_rng():
        functional.gaussian_noise(x)
    assert torch.equal(functional.gaussian_noise(x), first)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_elements_count_in_row_major_order(backend, x):
    with fastreg.use_backend(backend):
        assert torch.equal(noisy(x.t()), noisy(x.t().contiguous()))
        assert torch.equal(noisy(x[:, 3:7]), noisy(x[:, 3:7].clone()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(dtype):
    x = torch.randn(1000).to(dtype)
    for kind in ("additive", "multiplicative"):
        assert torch.equal(noisy(x, kind), noisy(x.float(), kind).to(dtype))


# Derivatives ---------------------------------------------------------------------------------------------


def exported(x, kind):
    """What is drawn, in float64."""
    torch.manual_seed(1)
    zeros = torch.zeros_like(x) if kind == "additive" else torch.ones_like(x)
    return noisy(zeros, kind)


@pytest.mark.parametrize("kind", ["additive", "multiplicative"])
def test_gradients_equal_autograds_with_the_noise_exported(kind, x):
    x = x[:3].double().requires_grad_()
    drawn = exported(x.detach(), kind)

    def plain(x):
        return x + drawn if kind == "additive" else x * drawn

    def loss(y):
        return (y**3).sum()

    actual = torch.autograd.grad(loss(noisy(x, kind)), x)
    expected = torch.autograd.grad(loss(plain(x)), x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda x: noisy(x, kind), x)
    assert torch.autograd.gradgradcheck(lambda x: noisy(x, kind).square(), x)


@pytest.mark.parametrize("kind", ["additive", "multiplicative"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_draw_the_same_noise(reentrant, kind):
    x, weight = torch.randn(6, 5, requires_grad=True), torch.randn(5, 5)

    def body(x):
        return torch.tanh(functional.gaussian_noise(x @ weight, 0.5, kind=kind)) ** 2

    def gradient(run):
        x.grad = None
        torch.manual_seed(3)
        run(x).sum().backward()
        return x.grad

    plain = gradient(body)
    assert torch.equal(gradient(lambda x: checkpoint(body, x, use_reentrant=reentrant)), plain)
    compiled = torch.compile(body, backend="aot_eager")
    assert torch.equal(gradient(lambda x: checkpoint(compiled, x, use_reentrant=reentrant)), plain)


@pytest.mark.parametrize("kind", ["additive", "multiplicative"])
def test_func(kind, x):
    drawn = exported(x, kind)
    slope = torch.ones_like(x) if kind == "additive" else drawn

    def f(x):
        return functional.gaussian_noise(x, 0.3, kind=kind)

    torch.manual_seed(1)
    torch.testing.assert_close(torch.func.grad(lambda x: f(x).sum())(x), slope)
    torch.manual_seed(1)
    value, tangent = torch.func.jvp(f, (x,), (2 * x,))
    assert torch.equal(value, noisy(x, kind)) and torch.equal(tangent, 2 * x * slope)
    torch.manual_seed(1)
    _, product = torch.func.jvp(torch.func.grad(lambda x: (f(x) ** 3).sum()), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(product, 6 * value * slope**2)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(f)(x)
    torch.manual_seed(1)
    same = torch.vmap(f, randomness="same")(torch.ones_like(x))
    torch.manual_seed(1)
    assert torch.equal(same, f(torch.ones_like(x[0])).expand_as(x))
    different = torch.vmap(f, randomness="different")(torch.ones_like(x))
    assert len(set(map(bytes, different.numpy()))) == len(x)
    gradients = torch.vmap(torch.func.grad(lambda x: f(x).sum()), randomness="different")(x)
    assert gradients.shape == x.shape


@pytest.mark.parametrize("kind, expected", [("additive", 0), ("multiplicative", 12)])
def test_what_is_saved_for_the_backward_pass(kind, expected):
    saved = []

    def pack(tensor):
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        functional.gaussian_noise(torch.randn(1000, requires_grad=True), 0.5, kind=kind)
    assert sum(saved) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, dtype):
    x, seed = torch.randn(4, 8, dtype=dtype), torch.tensor(3)
    torch.library.opcheck(noise_ops.noise, (x, seed, torch.tensor(0.5), 1, kind))
    torch.library.opcheck(noise_ops.noise, (x, seed, torch.rand(4), 8, kind))


def test_two_calls_in_a_graph_differ(x):
    """With gradients a compiler would merge calls that look alike."""
    module = ActivationNoise(0.5, "multiplicative")
    merging = "aot_eager_decomp_partition"  # as Inductor does
    compiled = torch.compile(lambda x: (module(x), module(x)), fullgraph=True, backend=merging)
    a, b = compiled(x.requires_grad_())
    assert not torch.equal(a, b)
    for y in (a, b):
        (g,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
        torch.testing.assert_close(g * x, y)
