"""Dropout: masks that are a function of (seed, index), and all that torch does with an operator."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastreg
from fastreg.nn import Dropout, functional, ops, rates

SEEDS = [0, 7, 2**31 + 5, 2**40 + 3, -1, -(2**62)]
SIZES = [*range(1, 18), 4095, 4096, 4097, 8192 + 2048 + 9]
BACKENDS = ["reference", "compiled", "triton"]


def mask(seed, p, shape, backend="reference", dtype=torch.float32):
    with fastreg.use_backend(backend):
        ones = torch.ones(shape, dtype=dtype)
        return ops.dropout(ones, torch.tensor(seed), rates.thresholds(p), 1, None) != 0


def drop(x, seed, p, **options):
    """With the seed pinned."""
    torch.manual_seed(seed)
    return functional.dropout(x, p, **options)


# Masks ---------------------------------------------------------------------------------------------------


def test_known_answer():
    """64 elements, so that no release changes what a seed means."""
    kept = mask(1234567, 0.5, 64)
    assert f"{int(''.join(map(str, kept.int().tolist())), 2):016x}" == KNOWN


KNOWN = "e417143b7453b337"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("other", ["compiled", "triton"])
def test_the_same_mask_everywhere(other, seed):
    for size in SIZES:
        assert torch.equal(mask(seed, 0.3, size, other), mask(seed, 0.3, size)), size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_mask_for_every_dtype(dtype):
    assert torch.equal(mask(3, 0.3, 4097, "triton", dtype), mask(3, 0.3, 4097))


@pytest.mark.parametrize("block, per_thread", [(2048, 16), (4096, 8), (8192, 32)])
def test_the_same_mask_for_every_block(block, per_thread, monkeypatch):
    expected = mask(5, 0.4, 9000)
    monkeypatch.setattr(ops, "BLOCK", block)
    monkeypatch.setattr(ops, "PER_THREAD", per_thread)
    assert torch.equal(mask(5, 0.4, 9000, "triton"), expected)


def test_the_same_mask_for_every_chunk(monkeypatch):
    expected = mask(5, 0.4, 9000)
    monkeypatch.setattr(ops, "CHUNK", 64)
    assert torch.equal(mask(5, 0.4, 9000), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_elements_count_in_row_major_order(backend):
    """Whatever the strides: a transposed view, a slice, one that starts amid an allocation."""
    with fastreg.use_backend(backend):
        x = torch.randn(24, 20)
        expected = drop(x.t().contiguous(), 1, 0.4)
        assert torch.equal(drop(x.t(), 1, 0.4), expected)
        assert torch.equal(drop(x[:, 3:17], 1, 0.4), drop(x[:, 3:17].clone(), 1, 0.4))
        assert torch.equal(drop(x.view(-1)[3:], 1, 0.4), drop(x.view(-1)[3:].clone(), 1, 0.4))
        assert torch.equal(drop(x.view(-1), 1, 0.4).view(24, 20), drop(x, 1, 0.4))


@pytest.mark.parametrize("p", [1e-3, 0.01, 0.05, 0.1, 1 / 3, 0.5, 0.9, 0.999])
def test_as_many_stay_as_should(p):
    n = 2**22
    kept = int(mask(2024, p, n, "compiled").sum())
    assert abs(kept - n * (1 - p)) < 5 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("p", [0.001, 0.1, 0.3])
def test_the_mean_is_kept(p):
    n = 2**22
    with fastreg.use_backend("compiled"):
        y = drop(torch.ones(n), 5, p)
    assert abs(y.double().mean() - 1) < 5 * math.sqrt(p / ((1 - p) * n))


def test_masks_of_different_calls_agree_by_chance_alone():
    n, p = 2**20, 0.3
    masks = [mask(seed, p, n, "compiled") for seed in (0, 1, 2**32, 2**63 - 1)]
    q = p * p + (1 - p) ** 2
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs(int((a == b).sum()) - n * q) < 5 * math.sqrt(n * q * (1 - q))


def test_no_lag_is_correlated():
    n = 2**20
    kept = mask(11, 0.5, n, "compiled").float() * 2 - 1
    for lag in (*range(1, 65), *(2**k for k in range(7, 20))):
        assert abs(float((kept[:-lag] * kept[lag:]).sum())) < 5 * math.sqrt(n - lag), lag


def test_no_rows_columns_or_tiles_are_equal():
    kept = mask(3, 0.5, (1024, 1024), "compiled").to(torch.uint8)
    for parts in (kept, kept.t(), kept.view(32, 32, 16, 64).transpose(1, 2).reshape(-1, 32 * 64)):
        assert len(set(map(bytes, parts.contiguous().numpy()))) == len(parts)


# Identities ----------------------------------------------------------------------------------------------


@pytest.fixture
def x():
    return torch.randn(37, 11, generator=torch.Generator().manual_seed(0))


def test_rates_of_0_and_1(backend, x):
    with torch.no_grad():
        x[0, 0], x[1, 1] = math.inf, math.nan
    assert torch.equal(drop(x, 0, 0.0).view(torch.int32), x.view(torch.int32))
    assert torch.equal(drop(x, 0, 1.0), torch.zeros_like(x))


def test_only_0_and_1_are_realised_as_such():
    assert [rates.threshold(p) for p in (0, 1e-9, 0.5, 1 - 1e-9, 1)] == [0, 1, 32768, 65535, 65536]
    assert rates.thresholds([0.0, 1e-9, 0.5, 1 - 1e-9, 1.0]).tolist() == [0, 1, 32768, 65535, 65536]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_stays_is_scaled_by_the_rate_realised(backend, dtype, x):
    x, p = x.to(dtype), 0.3
    y = drop(x, 1, p)
    wide = torch.promote_types(dtype, torch.float32)
    scaled = x.to(wide) * (65536 / torch.tensor(65536 - round(p * 65536), dtype=wide))
    stays = y != 0
    assert y.dtype == dtype and 0 < int((~stays).sum()) < x.numel() and not y[~stays].any()
    if backend == "triton" and dtype == torch.bfloat16:  # the interpreter truncates
        assert ((y.float() - scaled).abs() <= scaled.abs() * 2**-7)[stays].all()
    else:
        assert torch.equal(y[stays], scaled.to(dtype)[stays])


def test_what_is_dropped_is_0_whatever_it_was(backend):
    for bad in (math.inf, -math.inf, math.nan):
        x = torch.full((999,), bad, requires_grad=True)
        y = drop(x, 2, 0.5)
        y.backward(torch.full_like(y, bad))
        for found in (y.detach(), x.grad):
            dropped = found == 0
            assert 400 < int(dropped.sum()) < 600 and not found[~dropped].isfinite().any()


def test_backward_is_forward(backend, x):
    x.requires_grad_()
    y = drop(x, 3, 0.4)
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(g, drop(torch.ones_like(x), 3, 0.4))
    a, b = torch.randn_like(x), torch.randn_like(x)
    (adjoint,) = torch.autograd.grad(drop(x, 3, 0.4), x, a)
    assert torch.equal(adjoint, drop(a, 3, 0.4))
    forwards, backwards = (a.double() * drop(b, 3, 0.4)).sum(), (adjoint.double() * b).sum()
    assert abs(forwards - backwards) < 1e-5


def test_in_place_equals_out_of_place(backend, x):
    expected = drop(x, 4, 0.4)
    own = x.clone()
    assert drop(own, 4, 0.4, inplace=True) is own and torch.equal(own, expected)
    leaf = x.clone().requires_grad_()
    own = leaf * 2
    drop(own, 4, 0.4, inplace=True).sum().backward()
    assert torch.equal(leaf.grad, 2 * drop(torch.ones_like(x), 4, 0.4))
    view = x.clone().t()
    drop(view, 4, 0.4, inplace=True)
    assert torch.equal(view, drop(x.t(), 4, 0.4))
    with pytest.raises(RuntimeError, match="leaf"):
        drop(leaf, 4, 0.4, inplace=True)


def test_a_rate_for_each_channel(backend):
    x = torch.randn(6, 8, 5)
    for dim in (0, 1, -1, -3):
        n = x.shape[dim]
        assert torch.equal(drop(x, 5, [0.3] * n, dim=dim), drop(x, 5, 0.3))
        own = torch.linspace(0, 1, n)
        y = drop(x, 5, own, dim=dim)
        for channel, p in enumerate(own.tolist()):
            assert torch.equal(y.select(dim, channel), drop(x, 5, p).select(dim, channel))
    with pytest.raises(ValueError, match="p has 4 rates, but dimension 1 of shape .* has 8 channels"):
        functional.dropout(x, [0.1] * 4, dim=1)
    with pytest.raises(IndexError, match=r"dim must be in \[-3, 2\], got 3"):
        functional.dropout(x, [0.1] * 5, dim=3)


def test_many_channels_span_blocks():
    own = torch.rand(5000, generator=torch.Generator().manual_seed(1))
    x = torch.ones(3, 5000)
    found = []
    for backend in BACKENDS:
        with fastreg.use_backend(backend):
            found.append(drop(x, 6, own))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("shape", [(6, 1, 5), (1, 8, 1), (6, 1, 1), (1, 1, 1), (6, 8, 5)])
def test_a_mask_that_is_broadcast(backend, shape):
    x = torch.randn(6, 8, 5, requires_grad=True)
    y, kept = drop(x, 7, 0.5, noise_shape=shape, return_mask=True)
    factors = drop(torch.ones(shape), 7, 0.5)
    assert kept.shape == shape and torch.equal(kept, factors != 0)
    assert torch.equal(y, x * factors)
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(g, factors.expand_as(x))


def test_the_mask_is_returned(backend, x):
    y, kept = drop(x, 8, 0.4, return_mask=True)
    assert kept.dtype == torch.bool and torch.equal(kept, y != 0)
    y, kept = functional.dropout(x, 0.4, training=False, return_mask=True)
    assert y is x and kept.all() and kept.shape == x.shape


# Randomness ----------------------------------------------------------------------------------------------


def test_torch_rules_the_seeds(x):
    assert torch.equal(drop(x, 9, 0.5), drop(x, 9, 0.5))
    torch.manual_seed(9)
    first, second = functional.dropout(x, 0.5), functional.dropout(x, 0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(9)
    with torch.random.fork_rng():
        functional.dropout(x, 0.5)
    assert torch.equal(functional.dropout(x, 0.5), first)


def twice(x, p):
    return functional.by_thresholds(x, p), functional.by_thresholds(x, p)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_two_calls_in_a_graph_differ(backend, x):
    """With gradients a compiler would merge calls that look alike."""
    compiled = torch.compile(twice, fullgraph=True, backend=backend)
    a, b = compiled(x.requires_grad_(), rates.thresholds(0.5))
    assert not torch.equal(a, b)
    (of_a,), (of_b,) = (torch.autograd.grad(y, x, torch.ones_like(x), retain_graph=True) for y in (a, b))
    assert torch.equal(of_a != 0, a != 0) and torch.equal(of_b != 0, b != 0)


def test_compiled_equals_eager_where_torch_draws_the_same(x):
    import torch._inductor.config as config

    expected = drop(x, 10, 0.5)
    with config.patch(fallback_random=True):
        compiled = torch.compile(lambda x: functional.dropout(x, 0.5), fullgraph=True)
        torch.manual_seed(10)
        assert torch.equal(compiled(x), expected)


def counting():
    """A compiler that counts graphs."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph

    return graphs, compiler


def test_no_rate_compiles_anew(x):
    graphs, compiler = counting()
    module = Dropout(0.5)
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    for i in range(21):
        module.p = p = i / 20
        torch.manual_seed(i)
        assert torch.equal(compiled(x), drop(x, i, p))
    assert len(graphs) == 1


# Derivatives ---------------------------------------------------------------------------------------------


def network(x, weight, with_checkpoint=None):
    def body(x):
        return torch.tanh(functional.dropout(x @ weight, 0.5))

    if with_checkpoint is not None:
        x = checkpoint(body, x, use_reentrant=with_checkpoint)
    else:
        x = body(x)
    return functional.dropout(x, 0.3).square().sum()


@pytest.mark.parametrize("compiled", ["no", "outside", "inside"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_equal_finite_differences(reentrant, compiled):
    """With and without recomputation, of either kind, within a compiled function and around one."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 6, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64)
    x.requires_grad_()
    weight.requires_grad_()
    function = network
    if compiled == "outside":
        if reentrant:
            pytest.skip("Dynamo does not trace the reentrant kind")
        function = torch.compile(network, backend="aot_eager", fullgraph=True)
    elif compiled == "inside":
        inner = torch.compile(lambda x, w: torch.tanh(functional.dropout(x @ w, 0.5)), backend="aot_eager")

        def function(x, weight, kind=None):
            y = inner(x, weight) if kind is None else checkpoint(inner, x, weight, use_reentrant=kind)
            return functional.dropout(y, 0.3).square().sum()

    def value(x):
        torch.manual_seed(1)
        return function(x, weight, reentrant)

    (gradient,) = torch.autograd.grad(value(x), x) if not reentrant else [_by_backward(value, x)]
    direction, h = torch.randn_like(x), 1e-6
    # Recomputation draws as the forward pass did: both sides of the difference see the same masks.
    ahead, behind = value(x + h * direction), value(x - h * direction)
    difference = (ahead - behind).item() / (2 * h)
    assert abs(float((gradient * direction).sum()) - difference) < 1e-6 * abs(difference)


def _by_backward(value, x):
    value(x).backward()
    return x.grad


def test_double_backward(x):
    x = x.double().requires_grad_()
    torch.manual_seed(3)
    assert torch.autograd.gradgradcheck(lambda x: drop(x, 3, 0.5).square(), x)
    y = drop(x, 3, 0.5)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (gg,) = torch.autograd.grad(g.sum(), x)
    assert torch.equal(gg, 2 * drop(torch.ones_like(x), 3, 0.5) ** 2)


def test_func(x):
    factors = drop(torch.ones_like(x), 4, 0.5)

    def loss(x):
        return functional.dropout(x, 0.5).square().sum()

    torch.manual_seed(4)
    assert torch.allclose(torch.func.grad(loss)(x), 2 * x * factors**2)
    torch.manual_seed(4)
    value, tangent = torch.func.jvp(lambda x: functional.dropout(x, 0.5), (x,), (2 * x,))
    assert torch.equal(value, x * factors) and torch.equal(tangent, 2 * x * factors)
    torch.manual_seed(4)
    (cotangent,) = torch.func.vjp(lambda x: functional.dropout(x, 0.5), x)[1](x)
    assert torch.equal(cotangent, x * factors)


@pytest.mark.parametrize("dim", [0, 1])
def test_vmap(x, dim):
    def f(x):
        return functional.dropout(x, 0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(f, in_dims=dim)(x)
    same = torch.vmap(f, in_dims=dim, randomness="same")(x) != 0
    assert (same == same[0]).all() and 0 < int(same.sum()) < same.numel()
    different = torch.vmap(f, in_dims=dim, randomness="different")(x) != 0
    assert len(set(map(bytes, different.numpy()))) > 1
    gradient = torch.vmap(torch.func.grad(lambda x: f(x).sum()), in_dims=dim, randomness="different")(x)
    assert set(gradient.unique().tolist()) == {0.0, 2.0} and gradient.shape == different.shape
    torch.manual_seed(5)
    single = functional.dropout(x.select(dim, 0), 0.5)
    torch.manual_seed(5)
    assert torch.equal(torch.vmap(f, in_dims=dim, randomness="same")(x)[0], single)


@pytest.mark.parametrize("size", [10, 100_000])
def test_what_is_saved_for_the_backward_pass(size):
    saved = []

    def pack(tensor):
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        functional.dropout(torch.randn(size, requires_grad=True), 0.5)
    assert sum(saved) == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, seed = torch.randn(4, 8, dtype=dtype, requires_grad=True), torch.tensor(3)
    plain, channels = rates.thresholds(0.5), rates.thresholds([0.1] * 8)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for given in ((x, seed, plain, 1, None), (x, seed, channels, 1, None), (x, seed, plain, 1, [4, 1])):
        torch.library.opcheck(ops.dropout, (given[0].detach(), *given[1:]), test_utils=tests)
    torch.library.opcheck(ops.dropout_, (x.detach().clone(), seed, plain, 1, None), test_utils=tests)
    full = (x.detach(), torch.randn(8, dtype=dtype), x.detach(), seed, plain, 1, "gelu")
    torch.library.opcheck(ops.bias_act_dropout_add, full, test_utils=tests)
    torch.library.opcheck(ops.bias_act_dropout_backward, (x.detach(), *full[:2], *full[3:]), test_utils=tests)


# The module ----------------------------------------------------------------------------------------------


def test_it_is_a_dropout(x):
    module = Dropout(0.25)
    assert isinstance(module, nn.Dropout) and module.p == 0.25 and not module.inplace
    assert repr(module) == repr(nn.Dropout(0.25)) and repr(Dropout(0.1, True)) == repr(nn.Dropout(0.1, True))
    assert not module.state_dict() and not list(module.parameters())
    torch.manual_seed(0)
    assert torch.equal(module(x), drop(x, 0, 0.25))
    assert module.eval()(x) is x
    assert Dropout(0)(x) is x
    module.load_state_dict(nn.Dropout(0.5).state_dict())


def test_the_rate_is_what_was_set(x):
    module = Dropout(0.1)
    module.p = 0.9
    torch.manual_seed(0)
    assert module.p == 0.9 and torch.equal(module(x), drop(x, 0, 0.9))
    module.p = [0.1] * 11
    torch.manual_seed(0)
    assert torch.equal(module(x), drop(x, 0, 0.1))
    for bad in (-0.1, 1.1, math.nan, [0.5, 2.0]):
        with pytest.raises(ValueError, match=r"p must be .*\[0, 1\]"):
            module.p = bad
        with pytest.raises(ValueError, match=r"p must be .*\[0, 1\]"):
            Dropout(bad)
    assert module.p == [0.1] * 11


def test_no_conversion_changes_the_rate(x):
    module = Dropout(0.1)
    for changed in (module.bfloat16(), module.half(), module.double(), copy.deepcopy(module)):
        assert int(changed.thresholds) == round(0.1 * 65536) and changed.thresholds.dtype == torch.int32
    with torch.device("meta"):
        module = Dropout(0.1)
    module.to_empty(device="cpu")
    assert int(module.thresholds) == round(0.1 * 65536)
    again = pickle.loads(pickle.dumps(module))
    torch.manual_seed(0)
    assert again.p == 0.1 and torch.equal(again(x), drop(x, 0, 0.1))
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=False).p == 0.1


def test_autocast(x):
    with torch.autocast("cpu", torch.bfloat16):
        y = Dropout(0.5)(x @ x.t())
    assert y.dtype == torch.bfloat16


def test_sizes_of_noise_may_be_left_open():
    module = Dropout(0.5, noise_shape=(None, 1, None))
    y = module(torch.ones(4, 6, 5))
    assert torch.equal(y, y[:, :1].expand_as(y)) and 0 < int((y == 0).sum()) < y.numel()
    with pytest.raises(ValueError, match="does not fit an input of shape"):
        module(torch.ones(4))


def test_refusals(x):
    with pytest.raises(TypeError, match="floating dtype, got torch.int64"):
        functional.dropout(torch.ones(3, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"noise_shape must have the input's sizes \(37, 11\) or 1, got \(2, 11\)"
    ):
        functional.dropout(x, 0.5, noise_shape=(2, 11))
    with pytest.raises(ValueError, match="p must be a rate or one for each channel"):
        functional.dropout(x, torch.rand(2, 2))


def test_a_module_that_is_called_twice_keeps_both_masks(x):
    module = Dropout(0.5)
    leaf = x.requires_grad_()
    a, b = module(leaf), module(leaf)
    (of_a,) = torch.autograd.grad(a, leaf, torch.ones_like(a))
    (of_b,) = torch.autograd.grad(b, leaf, torch.ones_like(b))
    assert torch.equal(of_a != 0, a != 0) and torch.equal(of_b != 0, b != 0) and not torch.equal(of_a, of_b)


def test_an_empty_input(backend):
    x = torch.empty(0, 5, requires_grad=True)
    functional.dropout(x, 0.5).sum().backward()
    assert x.grad.shape == (0, 5)


def test_export(x):
    module = nn.Sequential(nn.Linear(11, 3), Dropout(0.5))
    graph = str(torch.export.export(module, (x,)).graph)
    assert "fastreg.dropout" in graph
    assert "fastreg" not in str(torch.export.export(module.eval(), (x,)).graph)
