"""Bias, activation, dropout and residual in one pass: against their composition with the same mask."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastreg
from fastreg.nn import BiasActDropout, BiasActDropoutAdd, BiasDropoutAdd, DropoutAdd, functional
from fastreg.nn.functional import bias_act_dropout, bias_act_dropout_add, bias_dropout_add, dropout_add
from fastreg.reference.activations import ACTIVATIONS

TORCH = {
    "identity": nn.Identity(), "relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
}  # fmt: skip
FUNCTIONS = {name: TORCH.get(name, activation.function) for name, activation in ACTIVATIONS.items()}
FORMS = [(True, True), (True, False), (False, True), (False, False)]  # bias, residual


def inputs(shape=(5, 7, 24), dtype=torch.float32, bias=True, residual=True, spread=2.0):
    generator = torch.Generator().manual_seed(0)

    def draw(shape):
        made = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
        return made.to(dtype).requires_grad_()

    return draw(shape), draw(shape[-1:]) if bias else None, draw(shape) if residual else None


def composed(x, bias, residual, p, activation, seed):
    """In parts, with the mask that the seed gives."""
    torch.manual_seed(seed)
    _, kept = functional.dropout(torch.ones(x.shape, dtype=x.dtype), p, return_mask=True)
    scale = 65536 / (65536 - fastreg.nn.rates.drop_thresholds(p).to(x.dtype))
    y = FUNCTIONS[activation](x if bias is None else x + bias)
    y = torch.where(kept, y * scale, 0)
    return y if residual is None else residual + y


def seeded(seed, function, *args, **options):
    torch.manual_seed(seed)
    return function(*args, **options)


def gradients(y, tensors):
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, [t for t in tensors if t is not None], g)


@pytest.mark.slow(backend="compiled", activation=("identity", "relu", "gelu_tanh", "silu"))
@pytest.mark.parametrize("bias, residual", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_its_parts(backend, activation, bias, residual, close):
    if backend == "compiled" and not (bias and residual):
        pytest.skip("compiling takes seconds, and this takes nothing but less")
    tensors = inputs(dtype=torch.float64, bias=bias, residual=residual)
    for p in (0.0, 0.3, torch.linspace(0, 0.9, 24)):
        y = seeded(3, bias_act_dropout_add, *tensors, p, activation=activation)
        expected = composed(*tensors, p, activation, 3)
        close(y, expected)
        close(gradients(y, tensors), gradients(expected, tensors))


@pytest.mark.slow(backend="compiled")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_the_parts_in_the_same_dtype(backend, dtype, activation):
    if backend == "compiled" and activation not in ("gelu", "gelu_tanh"):
        pytest.skip("compiling takes seconds, and the others are simpler")
    """No further from float64 than twice what torch's own composition is, and a rounding of the result."""
    tensors = inputs((64, 96), dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    y = seeded(4, bias_act_dropout_add, *tensors, 0.3, activation=activation)
    parts, truth = composed(*tensors, 0.3, activation, 4), composed(*exact, 0.3, activation, 4)
    actual = [y, *gradients(y, tensors)]
    theirs = [parts, *gradients(parts, tensors)]
    wanted = [truth, *gradients(truth, exact)]
    unit = torch.finfo(dtype).eps  # a whole one: the interpreter truncates
    for a, b, c in zip(actual, theirs, wanted, strict=True):
        error, other = ((t.double() - c).abs().max() for t in (a, b))
        assert a.dtype == dtype and error <= 2 * other + unit * c.abs().max()


@pytest.mark.slow(backend="compiled")
def test_reduces_to_plain_dropout(backend):
    x, _, residual = inputs()
    plain = seeded(5, functional.dropout, x, 0.4)
    zeros = torch.zeros(24)
    assert torch.equal(seeded(5, bias_act_dropout_add, x, p=0.4), plain)
    assert torch.equal(seeded(5, bias_act_dropout_add, x, zeros, torch.zeros_like(x), 0.4), plain)
    assert torch.equal(seeded(5, dropout_add, x, residual, 0.4), residual + plain)
    assert torch.equal(
        seeded(5, bias_dropout_add, x, zeros, residual, 0.4), seeded(5, dropout_add, x, residual, 0.4)
    )


@pytest.mark.parametrize("shape", [(1,), (17,), (3, 5), (1, 4097), (33, 129), (2, 3, 770)])
def test_odd_sizes_agree_everywhere(shape):
    actual = []
    for backend in ("reference", "compiled", "triton"):
        tensors = inputs(shape, torch.float64)
        with fastreg.use_backend(backend):
            y = seeded(6, bias_act_dropout_add, *tensors, 0.5, activation="silu")
            actual.append([y, *gradients(y, tensors)])
    for other in actual[1:]:
        assert all(map(lambda a, b: torch.allclose(a, b, rtol=1e-12, atol=1e-14), other, actual[0]))


@pytest.mark.slow(backend="compiled")
def test_non_contiguous(backend):
    x, bias, residual = inputs((24, 20), bias=False)
    y = seeded(7, dropout_add, x.t(), residual.t(), 0.5)
    assert torch.equal(y, seeded(7, dropout_add, x.t().contiguous(), residual.t().contiguous(), 0.5))


@pytest.mark.slow(backend="compiled")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in Triton's interpreter
def test_what_is_dropped_is_0_with_its_gradient(backend):
    for bad in (math.inf, -math.inf, math.nan):
        x = torch.full((99,), bad, requires_grad=True)
        y = seeded(8, bias_act_dropout_add, x, p=0.5, activation="gelu")
        (g,) = torch.autograd.grad(y, x, torch.ones_like(y))
        _, kept = seeded(8, functional.dropout, torch.ones(99), 0.5, return_mask=True)
        assert not y[~kept].any() and not g[~kept].any() and 20 < int(kept.sum()) < 80


@pytest.mark.slow(backend="triton")
def test_gradcheck(backend):
    tensors = inputs((3, 5), torch.float64)
    assert torch.autograd.gradcheck(
        lambda *tensors: seeded(9, bias_act_dropout_add, *tensors, 0.5, activation="gelu"), tensors
    )


@pytest.mark.slow(backend="compiled")
def test_mixed_dtypes(backend):
    x, bias, residual = inputs()
    x = x.detach().bfloat16().requires_grad_()
    y = seeded(1, bias_act_dropout_add, x, bias, residual, 0.5, activation="gelu")
    assert y.dtype == torch.float32
    grads = torch.autograd.grad(y, (x, bias, residual), torch.ones_like(y))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    y = seeded(1, dropout_add, x, residual, 0.5)
    assert torch.autograd.grad(y, x, torch.ones_like(y))[0].dtype == torch.bfloat16


MODULES = {
    "DropoutAdd": (DropoutAdd(0.3), True),
    "BiasDropoutAdd": (BiasDropoutAdd(24, 0.3), True),
    "BiasActDropout": (BiasActDropout(24, 0.3, "silu"), False),
    "BiasActDropoutAdd": (BiasActDropoutAdd(24, 0.3, "relu"), True),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name, close):
    module, adds = MODULES[name]
    x, _, residual = inputs()
    tensors = (x, residual) if adds else (x,)
    expected = composed(x, module.bias, residual if adds else None, 0.3, module.activation, 2)
    close(seeded(2, module.train(), *tensors), expected)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    still = module.eval()(*tensors)
    assert torch.equal(torch.get_rng_state(), state)
    close(still, composed(x, module.bias, residual if adds else None, 0.0, module.activation, 2))
    module.train().p = 0.0
    assert torch.equal(module(*tensors), still)
    module.p = 0.3
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert compiled(*tensors).shape == x.shape
    assert list(module.state_dict()) == ([] if module.bias is None else ["bias"])
    assert "p=0.3" in repr(module) and (module.bias is None or "features=24" in repr(module))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    module = BiasActDropout(24, 0.3)
    x, _, _ = inputs()

    def run(wrapped):
        torch.manual_seed(0)
        y = checkpoint(module, x, use_reentrant=reentrant) if wrapped else module(x)
        x.grad = module.bias.grad = None
        y.square().sum().backward()
        return [y, x.grad, module.bias.grad]

    assert all(map(torch.equal, run(True), run(False)))


def test_func(close):
    x, bias, residual = inputs((6, 24))

    def loss(x, bias, residual):
        return bias_act_dropout_add(x, bias, residual, 0.5, activation="gelu").square().sum()

    torch.manual_seed(0)
    actual = torch.func.grad(loss, argnums=(0, 1, 2))(x, bias, residual)
    tensors = (x, bias, residual)
    expected = torch.autograd.grad(composed(*tensors, 0.5, "gelu", 0).square().sum(), tensors)
    close(list(actual), list(expected))
    each = torch.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None, 0), randomness="different")
    assert each(x, bias, residual).shape == (6, 24)


def test_double_backward_is_refused():
    x, bias, _ = inputs()
    y = bias_act_dropout(x, bias, 0.5)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    y = bias_dropout_add(x, bias, torch.zeros_like(x), 0.5)  # which is linear
    (h,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert torch.autograd.grad(h.sum(), x)[0].any()
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        g.sum().backward()


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        x = nn.Linear(24, 24, bias=False)(torch.randn(3, 24))
        assert x.dtype == torch.bfloat16 and BiasActDropout(24)(x).dtype == torch.bfloat16


def test_refusals():
    x, bias, residual = inputs()
    with pytest.raises(TypeError, match="floating dtype, got torch.int64"):
        dropout_add(x.long(), residual)
    with pytest.raises(ValueError, match="activation must be one of 'identity', .* got 'tanh'"):
        bias_act_dropout(x, bias, activation="tanh")
    with pytest.raises(ValueError, match="activation must be one of"):
        BiasActDropout(24, activation="tanh")
    with pytest.raises(ValueError, match=r"bias must have shape \(24,\), as x has features, got \(3,\)"):
        bias_act_dropout(x, bias[:3])
    with pytest.raises(ValueError, match="residual must have the shape of x"):
        dropout_add(x, residual[0])
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\], got p=1.5"):
        dropout_add(x, residual, 1.5)


def test_what_is_saved_for_the_backward_pass():
    """Where nothing is activated a seed and a threshold; else also x and the bias, which are there anyway."""
    x, bias, residual = inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bias_dropout_add(x, bias, residual, 0.5)
        assert sum(t.numel() * t.element_size() for t in saved) == 12
        saved.clear()
        bias_act_dropout(x, bias, 0.5)
    assert {t.data_ptr() for t in saved if t.numel() > 1} == {x.data_ptr(), bias.data_ptr()}


def test_no_features():
    x, bias = torch.zeros(2, 0, requires_grad=True), torch.zeros(0, requires_grad=True)
    bias_act_dropout(x, bias).sum().backward()
    assert x.grad.shape == (2, 0) and bias.grad.shape == (0,)
