"""Noise on inputs, activations and tokens: its moments, gradients, randomness, and hooks."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastreg
from fastreg.nn import (
    ActivationNoise,
    InputNoise,
    NoiseScheduler,
    TokenNoise,
    attach_activation_noise,
    functional,
    noise_functional,
)
from fastreg.ops import noise as noise_ops
from fastreg.reference.noise import KINDS
from fastreg.schedules import Linear

N = 2**18


def noisy(x, kind="additive", std=0.3, seed=1):
    """With the seed pinned."""
    torch.manual_seed(seed)
    return functional.gaussian_noise(x, std, kind=kind)


def counting():
    """A compiler that counts graphs."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph

    return graphs, compiler


# What is drawn -------------------------------------------------------------------------------------------


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


@pytest.fixture(autouse=True)
def reference():
    """Compiling takes seconds; `tests/kernels` compares the backends."""
    with fastreg.use_backend("reference"):
        yield


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
        found = noise_ops.noise(torch.ones(4), torch.tensor(1234567), torch.tensor(1.0), 1, kind)
        assert torch.equal(found, torch.tensor(expected))


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


# Levels and masks ----------------------------------------------------------------------------------------


def test_a_level_for_each_sample_and_a_mask():
    x = torch.randn(3, 5, 8)
    level, mask, each = torch.tensor([0.0, 0.1, 2.0]), torch.rand(3, 5) < 0.5, torch.rand(3, 5, 8)
    torch.manual_seed(0)
    z = functional.gaussian_noise(torch.zeros_like(x), 1.0)
    torch.manual_seed(0)
    found = functional.gaussian_noise(x, level, mask=mask)
    assert torch.equal(found, torch.where(mask[..., None], x + level[:, None, None] * z, x))
    torch.manual_seed(0)
    assert torch.equal(functional.gaussian_noise(x, each, mask=mask[:, 0]),
                       torch.where(mask[:, :1, None], x + each * z, x))  # fmt: skip
    torch.manual_seed(0)
    u = functional.uniform_noise(torch.zeros_like(x), 1.0)
    torch.manual_seed(0)
    assert torch.equal(
        functional.uniform_noise(x, 0.5, mask=mask), torch.where(mask[..., None], x + 0.5 * u, x)
    )


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

    found = torch.autograd.grad(loss(noisy(x, kind)), x)
    expected = torch.autograd.grad(loss(plain(x)), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
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


# Compiled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["additive", "multiplicative"])
def test_no_std_compiles_anew(kind, x):
    graphs, compiler = counting()
    module = InputNoise(0.5, kind)
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    for i in range(12):
        module.std = i / 10
        torch.manual_seed(1)
        assert torch.equal(compiled(x), noisy(x, kind, i / 10))
    assert len(graphs) == 1


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


# Modules -------------------------------------------------------------------------------------------------


def test_modules_train_alone(x):
    for module in (InputNoise(0.5), ActivationNoise(0.5, "multiplicative")):
        assert not torch.equal(module(x), x) and module.eval()(x) is x
        assert not module.state_dict() and copy.deepcopy(module).std == 0.5
    assert InputNoise(0.0)(x) is x
    assert repr(InputNoise(0.5)) == "InputNoise(std=0.5, kind='additive')"


def test_a_level_outlives_casts_and_meta(x):
    module = nn.Sequential(InputNoise(0.1)).bfloat16()
    assert module[0].level == torch.tensor(0.1) and module[0].level.dtype == torch.float32
    module = nn.Sequential(InputNoise(0.1), TokenNoise(0.1, 10, [3])).to("meta").to_empty(device="cpu")
    assert module[0].level == torch.tensor(0.1)
    assert module[1].drop_thresholds == 6554 and module[1].special.tolist() == [3]


def test_what_is_wrong_says_so(x):
    with pytest.raises(TypeError, match="TokenNoise"):
        InputNoise(0.1)(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="TokenNoise"):
        InputNoise(0.1).eval()(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="floating dtype, got torch.int64"):
        functional.gaussian_noise(torch.zeros(3, dtype=torch.int64))
    for bad in (-0.1, math.inf, math.nan, torch.tensor([0.1, -0.2])):
        with pytest.raises(ValueError, match="std must be finite and >= 0, got"):
            functional.gaussian_noise(x, bad)
    with pytest.raises(ValueError, match="magnitude must be finite"):
        functional.uniform_noise(x, -1.0)
    with pytest.raises(ValueError, match="std.detach()"):
        functional.gaussian_noise(x, torch.tensor(0.1, requires_grad=True))
    with pytest.raises(ValueError, match="kind must be 'additive' or 'multiplicative', got 'uniform'"):
        InputNoise(0.1, "uniform")
    with pytest.raises(ValueError, match="first sizes of the input"):
        functional.gaussian_noise(x, torch.ones(3))
    with pytest.raises(ValueError, match="mask must have the first sizes"):
        functional.gaussian_noise(x, 0.1, mask=torch.ones(3))
    with pytest.raises(TypeError, match="std must be a number"):
        InputNoise("0.1")
    module = InputNoise(0.1)
    with pytest.raises(ValueError, match="std=-1"):
        module.std = -1
    assert module.std == 0.1 and module.level == torch.tensor(0.1)


# Tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_tokens_are_replaced_at_a_rate(dtype):
    torch.manual_seed(0)
    ids = torch.randint(7, 50, (200, 500), dtype=dtype)
    special = (0, 1, 13, 49)
    mask = torch.rand(200, 500) < 0.8
    found = TokenNoise(0.3, 50, special)(ids, mask)
    assert found.dtype == dtype and found.shape == ids.shape
    stays = ~mask | torch.isin(ids, torch.tensor(special))
    assert torch.equal(found[stays], ids[stays])
    free, new = ids[~stays], found[~stays]
    assert not torch.isin(new, torch.tensor(special)).any() and set(new.tolist()) == set(range(50)) - set(
        special
    )
    n, q = len(free), 0.3 * 45 / 46  # of those drawn, one in 46 is the one that was there
    changed = int((free != new).sum())
    assert abs(changed - n * q) < 5 * math.sqrt(n * q * (1 - q))
    drawn = new[free != new]
    counts = torch.bincount(drawn[drawn < 7], minlength=7)[2:].double()  # of those that were never there
    expected = n * 0.3 / 46
    assert ((counts - expected).abs() < 5 * math.sqrt(expected)).all()


def test_tokens_stay():
    ids = torch.randint(10, (40, 50))
    assert TokenNoise(0.5, 10).eval()(ids) is ids and TokenNoise(0.0, 10)(ids) is ids
    assert torch.equal(TokenNoise(1.0, 10, range(9))(ids), torch.where(ids < 9, ids, 9))
    every = TokenNoise(1.0, 10)(ids)
    assert abs(float((every == ids).double().mean()) - 0.1) < 5 * math.sqrt(0.09 / 2000)
    assert torch.equal(functional.token_noise(ids, 1.0, 10, special_tokens=range(9)), ids.clamp(max=9))
    assert functional.token_noise(ids, 1.0, 10, training=False) is ids


def test_no_rate_of_tokens_compiles_anew():
    graphs, compiler = counting()
    module = TokenNoise(0.5, 100, [1, 2])
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    ids = torch.randint(3, 100, (64, 64))
    for rate in (0.5, 0.0, 0.1, 1.0):
        module.rate = rate
        changed = float((compiled(ids, torch.ones_like(ids)) != ids).double().mean())
        assert abs(changed - rate * 97 / 98) < 5 * math.sqrt(0.25 / ids.numel())
    assert len(graphs) == 1


def test_noise_on_tokens_refuses():
    with pytest.raises(TypeError, match="InputNoise"):
        TokenNoise(0.1, 10)(torch.rand(3))
    with pytest.raises(ValueError, match=r"special_tokens must be in \[0, 9\], got \[3, 10\]"):
        TokenNoise(0.1, 10, [10, 3])
    with pytest.raises(ValueError, match="vocab_size must be larger"):
        TokenNoise(0.1, 2, [0, 1])
    with pytest.raises(ValueError, match="rate must be a rate"):
        TokenNoise(1.5, 10)
    with pytest.raises(ValueError, match="mask must have the shape of the tokens"):
        TokenNoise(0.1, 10)(torch.zeros(2, 3, dtype=torch.int64), torch.ones(3))
    with pytest.raises(ValueError, match="torch.int8 cannot hold those of vocab_size=129"):
        TokenNoise(0.1, 129)(torch.zeros(3, dtype=torch.int8))
    assert TokenNoise(1.0, 128)(torch.zeros(99, dtype=torch.int8)).min() >= 0


# Hooks ---------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Returns a tuple."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x), x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
        self.pair = Pair()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        y, x = self.pair(x)
        return y + x


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("layers.?", ["layers.0", "layers.1", "layers.2"]),
        ("*inner", ["pair.inner"]),
        (re.compile(r"layers\.[12]\.0"), ["layers.1.0", "layers.2.0"]),
        (nn.ReLU, ["layers.0.1", "layers.1.1", "layers.2.1"]),
        ((Pair, nn.Sequential), ["layers.0", "layers.1", "layers.2", "pair"]),
    ],
)
def test_patterns(pattern, names):
    assert sorted(attach_activation_noise(Net(), pattern, 0.1).names) == names


def test_attached_noise_is_on_the_output():
    model, x = Net(), torch.randn(2000, 4)
    clean = model(x)
    with attach_activation_noise(model, "pair", 0.3) as noise:
        assert max(map(abs, moments((model(x) - clean).detach() / 0.3))) < 5
        noise.std = 0.0
        assert torch.equal(model(x), clean)
        noise.std = 0.1
        assert torch.equal(model.eval()(x), clean) and not torch.equal(model.train()(x), clean)
        model.pair.eval()
        assert torch.equal(model(x), clean)
        model.pair.train()
        assert torch.equal(copy.deepcopy(model).eval()(x), clean)
        assert not torch.equal(copy.deepcopy(model)(x), clean)
    assert torch.equal(model(x), clean) and not model.pair._forward_hooks
    assert set(model.state_dict()) == set(Net().state_dict())
    with pytest.raises(ZeroDivisionError), attach_activation_noise(model, "pair", 0.3):
        raise ZeroDivisionError
    assert torch.equal(model(x), clean)


@pytest.mark.parametrize("pattern", ["pair", "layers.1"])
def test_attached_noise_compiles_once(pattern):
    graphs, compiler = counting()
    model, x = Net(), torch.randn(30, 4)
    clean = model(x)
    noise = attach_activation_noise(model, pattern, 0.3, "multiplicative")
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for std in (0.3, 0.1, 0.0, 1.0):
        noise.std = std
        torch.manual_seed(0)
        found = compiled(x)
        torch.manual_seed(0)
        assert torch.equal(found, model(x)) and torch.equal(found, clean) == (std == 0)
    assert len(graphs) == 1
    noise.remove()
    noise.std = 0.3  # as a scheduler does that goes on
    assert torch.equal(compiled(x), clean)


def test_attaching_refuses():
    with pytest.raises(ValueError, match=r"'\*.mlp' matches no module of Net; there are: layers, layers.0, "):
        attach_activation_noise(Net(), "*.mlp", 0.1)
    with pytest.raises(ValueError, match="matches no module of Net; there are: Linear, ModuleList, Pair"):
        attach_activation_noise(Net(), nn.GELU, 0.1)
    with pytest.raises(TypeError, match="pattern must be"):
        attach_activation_noise(Net(), 3, 0.1)
    with pytest.raises(ValueError, match="std must be finite"):
        attach_activation_noise(Net(), "pair", -1.0)

    class Told(nn.Module):
        def forward(self, x):
            return {"x": x}

    model = nn.Sequential(Told())
    attach_activation_noise(model, "0", 0.1)
    with pytest.raises(TypeError, match="Told has returned dict"):
        model(torch.ones(3))


# Schedules -----------------------------------------------------------------------------------------------


def test_levels_follow_a_schedule():
    model = nn.Sequential(InputNoise(0.4), nn.Linear(4, 4), TokenNoise(0.2, 10))
    weights = fastreg.WeightNoise(
        [{"params": [model[1].weight]}, {"params": [model[1].bias], "std": 0.1}], 0.8
    )
    attached = attach_activation_noise(model, "1", 1.0)
    scheduler = NoiseScheduler([model, weights, attached], Linear(1.0, steps=4))

    def levels():
        return [
            model[0].std, model[2].rate, *(group["std"] for group in weights.param_groups), attached.std,
        ]  # fmt: skip

    bases = [0.4, 0.2, 0.8, 0.1, 1.0]
    for step in range(6):
        assert levels() == pytest.approx([base * max(0, 1 - step / 4) for base in bases])
        assert scheduler.get_last_level() == levels() and scheduler.last_step == step
        scheduler.step()
    scheduler.step(1)
    saved = scheduler.state_dict()
    scheduler.step()
    resumed = NoiseScheduler([model, weights, attached], Linear(1.0, steps=4))  # levels are those of step 2
    resumed.load_state_dict(saved)
    assert levels() == pytest.approx([base * 0.75 for base in bases]) and resumed.last_step == 1


def test_attributes_of_a_model_are_no_levels():
    model = nn.Sequential(InputNoise(0.4))
    model.alpha, model.std = 0.7, 0.5
    NoiseScheduler(model, lambda step: 0.5)
    assert (model[0].std, model.alpha, model.std) == (0.2, 0.7, 0.5)


def test_schedules_refuse(x):
    with pytest.raises(TypeError, match="Linear has no level of noise"):
        NoiseScheduler(nn.Linear(3, 3), Linear(1.0, steps=4))
    with pytest.raises(TypeError, match="factor must be a function"):
        NoiseScheduler(InputNoise(0.1), 0.5)
    module = InputNoise(0.4)
    with pytest.raises(ValueError, match="factor at step 1 must be finite and >= 0, got -1"):
        NoiseScheduler(module, lambda step: 1 - 2 * step).step()
    assert module.std == 0.4
    tokens = TokenNoise(0.4, 10)
    with pytest.raises(ValueError, match=r"rate at step 3 must be in \[0, 1\]"):
        NoiseScheduler([module, tokens], lambda step: 1 + step).step(3)
    assert (module.std, tokens.rate) == (0.4, 0.4)


def test_checked_level_takes_tensors_elsewhere_as_they_are():
    meta = torch.empty(3, device="meta")
    assert noise_functional.checked_level(meta) is meta
