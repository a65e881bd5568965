"""The operators: masks that are a function of (seed, index), and all that torch does with an operator."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastreg
from fastreg.nn import Dropout, functional, rates
from fastreg.ops import _elementwise as elementwise
from fastreg.ops import dropout as dropout_ops
from fastreg.runtime.launch_parameters import LaunchParameters, trying

SEEDS = [0, 7, 2**31 + 5, 2**40 + 3, -1, -(2**62)]
SIZES = [*range(1, 18), 4095, 4096, 4097, 8192 + 2048 + 9]
BACKENDS = ["reference", "compiled", "triton"]


def mask(seed, p, shape, backend="reference", dtype=torch.float32):
    with fastreg.use_backend(backend):
        ones = torch.ones(shape, dtype=dtype)
        return dropout_ops.dropout(ones, torch.tensor(seed), rates.drop_thresholds(p), 1, None) != 0


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
def test_the_same_mask_for_every_block(block, per_thread):
    expected = mask(5, 0.4, 9000)
    with trying("dropout", LaunchParameters(block, per_thread=per_thread)):
        assert torch.equal(mask(5, 0.4, 9000, "triton"), expected)


def test_the_same_mask_for_every_chunk(monkeypatch):
    expected = mask(5, 0.4, 9000)
    monkeypatch.setattr(elementwise, "REFERENCE_CHUNK", 64)
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
    return dropout_ops.drop(x, p), dropout_ops.drop(x, p)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_two_calls_in_a_graph_differ(backend, x):
    """With gradients a compiler would merge calls that look alike."""
    compiled = torch.compile(twice, fullgraph=True, backend=backend)
    a, b = compiled(x.requires_grad_(), rates.drop_thresholds(0.5))
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


def test_no_rate_compiles_anew(x, counting):
    graphs, compiler = counting
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
        # Dynamo does not trace the reentrant kind into its graph, but what is in it runs all the same.
        function = torch.compile(network, backend="aot_eager", fullgraph=not reentrant)
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
    x = x[:6, :5].double().requires_grad_()
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


def test_forward_mode_over_all_others(x):
    """Over reverse mode, for products with a Hessian, over vmap, and under it."""
    factors = drop(torch.ones_like(x), 4, 0.5)
    torch.manual_seed(4)
    _, product = torch.func.jvp(
        torch.func.grad(lambda x: (functional.dropout(x, 0.5) ** 3).sum()), (x,), (torch.ones_like(x),)
    )
    torch.testing.assert_close(product, 6 * x * factors**3)

    def f(x):
        return functional.dropout(x, 0.5)

    def tangent(x):
        return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]

    for randomness in ("same", "different"):
        torch.manual_seed(5)
        expected = torch.vmap(f, randomness=randomness)(torch.ones_like(x))
        torch.manual_seed(5)
        each = torch.vmap(f, randomness=randomness)
        assert torch.equal(torch.func.jvp(each, (x,), (torch.ones_like(x),))[1], expected)
        torch.manual_seed(5)
        assert torch.equal(torch.vmap(tangent, randomness=randomness)(x), expected)


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
    plain, channels = rates.drop_thresholds(0.5), rates.drop_thresholds([0.1] * 8)
    for arguments in ((x, seed, plain, 1, None), (x, seed, channels, 1, None), (x, seed, plain, 1, [4, 1])):
        torch.library.opcheck(dropout_ops.dropout, (arguments[0].detach(), *arguments[1:]))
    torch.library.opcheck(dropout_ops.dropout_, (x.detach().clone(), seed, plain, 1, None))
    full = (x.detach(), torch.randn(8, dtype=dtype), x.detach(), seed, plain, 1, "gelu")
    torch.library.opcheck(dropout_ops.bias_act_dropout_add, full)
    torch.library.opcheck(dropout_ops.bias_act_dropout_backward, full)


@pytest.mark.parametrize(
    "function",
    (
        lambda x, p: functional.dropout(x, p),
        lambda x, p: functional.bias_act_dropout_add(x, x[0], x, p, True, "gelu"),
        lambda x, p: functional.drop_path(x, p),
        lambda x, p: functional.token_noise(x.long(), p, 100),
    ),
    ids=("dropout", "bias_act_dropout_add", "drop_path", "token_noise"),
)
def test_rates_compile_into_one_graph(function, counting):
    """A rate that changes is a symbol for Dynamo, and its checks must not break the graph."""
    torch.compiler.reset()
    graphs, compiler = counting
    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    for p in (0.1, 0.2, 0.3, 0.4):
        compiled(torch.ones(4, 8), p)
    assert len(graphs) <= 2
