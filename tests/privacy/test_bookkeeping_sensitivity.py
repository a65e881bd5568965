"""No sample changes a sum by more than C, whatever it is; what cannot be clipped is refused by name."""

import dataclasses
import math
import types
from collections import UserDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastreg.privacy.bookkeeping import BookKeeping
from fastreg.privacy.per_sample_grads import DenseGrad, OuterProductGrad

BOUND = 0.37
ALLOWED = BOUND * (1 + 2**-20)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 12), nn.LayerNorm(12)
        self.second, self.conv = nn.Linear(12, 5), nn.Conv1d(4, 3, 2)

    def forward(self, x):
        return self.conv(self.second(self.norm(self.first(x).tanh())))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def backward(model, x, scales):
    """A mean over samples of losses with gradients of any size."""
    model.zero_grad()
    losses = model(x).square().flatten(1).sum(1) * scales
    losses.mean().backward()
    return {name: p.grad.double() for name, p in model.named_parameters()}


def norm_of(gradients):
    return float(torch.stack([g.norm() for g in gradients.values()]).norm())


def drawn(samples, seed=0):
    return torch.randn(samples, 4, 6, generator=torch.Generator().manual_seed(seed))


BAD = {
    "huge": (lambda x: x * 1e30, 1.0), "huge loss": (lambda x: x, 1e30),
    "denormal": (lambda x: x * 1e-42, 1.0),
    "denormal loss": (lambda x: x, 1e-42), "zero": (lambda x: x * 0, 1.0), "zero loss": (lambda x: x, 0.0),
    "NaN": (lambda x: x.index_fill(-1, torch.tensor(2), math.nan), 1.0),
    "infinite": (lambda x: x.index_fill(-1, torch.tensor(2), math.inf), 1.0),
    "NaN loss": (lambda x: x, math.nan), "infinite loss": (lambda x: x, -math.inf),
    "constant": (lambda x: torch.full_like(x, 0.1), 1e3),
    "large and small": (lambda x: x * torch.tensor([1e18, 1e-20, 1.0, 1e9, 1e-9, 0.0]), 1e-12),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_sample_of_any_kind_stays_within_the_bound_and_leaves_others_alone(net, kind):
    change, scale = BAD[kind]
    x, scales = drawn(4), torch.ones(4)
    BookKeeping(net, max_grad_norm=BOUND)
    others = backward(net, x[1:], scales[1:])
    x[0], scales[0] = change(x[0]), scale
    alone = backward(net, x[:1], scales[:1])
    assert norm_of(alone) <= ALLOWED
    engine = BookKeeping(net, max_grad_norm=BOUND, attach=False)
    together = backward(net, x, scales)
    for name, value in together.items():
        assert (value - others[name] - alone[name]).abs().max() <= 1e-6 * BOUND
    assert engine.norms is None  # was not attached
    assert norm_of({n: together[n] - others[n] for n in together}) <= ALLOWED + 1e-6 * BOUND  # of rounding


@pytest.mark.parametrize("kind", ["NaN", "infinite", "NaN loss", "infinite loss", "huge loss"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_what_is_not_finite_counts_for_nothing(net, kind, clipping):
    change, scale = BAD[kind]
    x, scales = drawn(3), torch.ones(3)
    engine = BookKeeping(net, max_grad_norm=BOUND, clipping=clipping)
    x[1], scales[1] = change(x[1]), scale
    others = backward(net, x[[0, 2]], scales[[0, 2]])
    assert engine.nonfinite_samples == 0
    together = backward(net, x, scales)
    assert all((together[n] - others[n]).abs().max() <= 1e-6 * BOUND for n in others)
    assert engine.nonfinite_samples == 1 and engine.samples == 3
    assert not engine.norms[1].isfinite() and engine.norms[[0, 2]].isfinite().all()
    alone = backward(net, x[1:2], scales[1:2])
    assert not any(value.any() for value in alone.values())


def test_neighbours_differ_by_the_bound_at_most(net):
    """With and without each sample, clipped or not."""
    x, scales = drawn(6), torch.logspace(-4, 2, 6)
    engine = BookKeeping(net, max_grad_norm=BOUND, loss_reduction="sum")

    def total(chosen):
        net.zero_grad()
        (net(x[chosen]).square().flatten(1).sum(1) * scales[chosen]).sum().backward()
        return {name: p.grad.double() for name, p in net.named_parameters()}

    whole = total(list(range(6)))
    assert 0 < engine.clipped_samples < 6
    for left_out in range(6):
        rest = total([i for i in range(6) if i != left_out])
        assert norm_of({n: whole[n] - rest[n] for n in whole}) <= BOUND * (1 + 1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 24), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31),
    st.sampled_from(["random", "equal", "cancelling", "constant", "positive"]), st.floats(-30, 12),
)  # fmt: skip
def test_norms_are_never_too_small(positions, p, d, seed, kind, exponent):
    """Of what layers hold, against float64; where addends cancel, a ghost norm loses its digits."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(2, positions, n, generator=generator) for n in (p, d))
    if kind == "equal":
        right = right[:, :1].expand_as(right)
    elif kind == "constant":
        left, right = torch.full_like(left, 0.1), torch.full_like(right, 0.7)
    elif kind == "positive":
        left, right = left.abs(), right.abs()
    elif kind == "cancelling" and positions > 1:
        right = right[:, :1].expand_as(right)
        left[:, -1] = -left[:, :-1].sum(1)  # their sum is rounding alone
    left = left * 2.0 ** int(exponent)
    exact = torch.bmm(left.double().mT, right.double()).flatten(1).norm(dim=1)
    part = OuterProductGrad(left, right)
    dense = DenseGrad(part.per_sample(0, 2))  # summed as it is
    for each, expected in ((part, exact), (dense, dense.values.double().flatten(1).norm(dim=1))):
        squares, error = each.squares()
        upper = (squares.clamp(min=0) + error).sqrt()
        assert (upper * (1 + 2**-21) >= expected).all()
        if kind != "cancelling":
            assert (upper <= expected * (1 + 1e-4) + 1e-15).all()


@pytest.mark.parametrize("elements", [1, 63, 65, 520, 2**14, 2**16 + 3])
@pytest.mark.parametrize("value", [0.1, 1.54, 3.3e7])
def test_norms_of_equal_elements(elements, value):
    """Their rounding errors all agree: sums in float32 must be short."""
    x = torch.full((2, elements), value)
    squares, _ = DenseGrad(x).squares()
    assert (squares.sqrt() * (1 + 2**-22) >= x.double().norm(dim=1)).all()


def refusal(make, match, **options):
    model = make()
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match=match):
        BookKeeping(model, **options)
    assert [dict(vars(module)) for module in model.modules()] == before


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))


class Sub(nn.Linear):
    def forward(self, x):
        return super().forward(x) ** 2


class OddRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.weight.square()


class Replaced(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)
        self.forward = lambda x: x


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), r"'1.weight' of BatchNorm1d.*GroupNorm"),
        (Bare, "'scale' of Bare"),
        (lambda: nn.MultiheadAttention(4, 2), "'in_proj_weight' of Multihead.*DPMultiheadAttention"),
        (lambda: nn.LSTM(3, 3), "'weight_ih_l0' of LSTM.*DPLSTM"),
        (lambda: nn.Sequential(Sub(3, 3)), "'0.weight' of Sub"),
        (lambda: nn.Sequential(OddRMSNorm()), "'0.weight' of OddRMSNorm: its output is not linear"),
        (lambda: nn.Sequential(Replaced()), "forward method was replaced"),
        (lambda: nn.Embedding(3, 3, max_norm=1.0), "max_norm"),
        (lambda: nn.Embedding(3, 3, sparse=True), "sparse"),
        (lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), "running statistics"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "weight is made of other"),
        (lambda: nn.ConvTranspose1d(3, 3, 2), "'weight' of ConvTranspose1d"),
        (lambda: nn.ModuleDict({"relative_attention_bias": nn.Embedding(3, 3)}), "used without samples"),
    ],
)
def test_refused_by_name(make, match):
    refusal(make, match)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"max_grad_norm": 0.0}, "must be > 0, got max_grad_norm=0.0"),
        ({"max_grad_norm": math.nan}, "must be > 0, got max_grad_norm=nan"),
        ({"max_grad_norm": [1.0, 1.0]}, "one number with clipping='flat', got 2"),
        (
            {"max_grad_norm": [1.0], "clipping": "per_layer"},
            "one number or 2 with .*'per_layer', got 1",
        ),
        ({"max_grad_norm": {"weight": 1.0}, "clipping": "per_layer"}, "no bound for parameter 'bias'"),
        ({"clipping": "automatic"}, "'flat', 'per_layer', got 'automatic'"),
        ({"loss_reduction": "none"}, "'mean', 'sum', got 'none'"),
        ({"batch_dim": 2}, "0, 1, got 2"),
        ({"shared_inputs": ["wpe"]}, "no layer that is covered: 'wpe'"),
    ],
)
def test_options_out_of_range(options, match):
    refusal(lambda: nn.Linear(3, 3), match, **options)


def test_weights_that_are_used_outside_of_their_layer():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.after = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.after(self.layer(x)) + F.linear(x, self.layer.weight)

    model = Functional()
    BookKeeping(model)
    with pytest.raises(RuntimeError, match="'layer.weight' got a gradient that is not clipped"):
        model(torch.randn(2, 3)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    model.layer.weight.requires_grad_(False)  # an ordinary pass then works
    model(torch.randn(2, 3)).sum().backward()
    assert model.after.weight.grad is not None


def test_attention_whose_output_layer_is_trained():
    """Its weight is a `Linear` that is never called."""
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    model.in_proj_weight.requires_grad_(False)
    model.in_proj_bias.requires_grad_(False)
    BookKeeping(model)
    x = torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match="'out_proj.*' got a gradient that is not clipped"):
        model(x, x, x)[0].sum().backward()


def test_frozen_statistics_only():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).requires_grad_(False))
    BookKeeping(model)
    with pytest.raises(RuntimeError, match="BatchNorm1d in training mixes samples"):
        model(torch.randn(2, 3))
    model[1].eval()
    model(torch.randn(2, 3)).sum().backward()
    assert model[0].weight.grad is not None


def test_inputs_without_samples():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x.flatten(0, 1))

    model = Folded()
    BookKeeping(model)
    with pytest.raises(ValueError, match=r"\[8, 3\] of 'layer' should have the 2 samples"):
        model(torch.randn(2, 4, 3))


def test_ids_that_may_be_positions():
    """Nothing tells them from labels that happen to count up, until others have been seen."""

    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.labels, self.layer = nn.Embedding(9, 3), nn.Linear(3, 3)

        def forward(self, x, labels):
            return self.layer(x + self.labels(labels))

    model, x, count = Conditioned(), torch.randn(4, 3), torch.arange(4)
    BookKeeping(model)
    with pytest.raises(ValueError, match=r"shared_inputs=\('labels',\)"):
        model(x, count)
    model(x, count.flip(0)).sum().backward()
    model.zero_grad()
    model(x, count).sum().backward()
    assert model.labels.weight.grad is not None


def test_layers_outside_of_the_model(net):
    """Positions would be taken for samples, each of which may count as much as the bound."""
    model = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3))
    BookKeeping(model)
    positions = model[0](torch.randn(1, 50, 3)).view(50, 3)
    with pytest.raises(RuntimeError, match="'1' was called outside of the model"):
        model[1](positions)
    with torch.no_grad():
        model[1](positions)


def test_where_samples_are_looked_for():
    @dataclasses.dataclass
    class Batch:
        x: Any

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, batch):
            x = batch.x if hasattr(batch, "x") else batch["x"]
            return self.layer(x.view(-1, 3))

    model, x = Flat(), torch.randn(2, 5, 3)
    BookKeeping(model)
    for batch in (Batch(x), UserDict(x=x), {"x": x}):
        with pytest.raises(ValueError, match="should have the 2 samples"):
            model(batch)
    with pytest.raises(RuntimeError, match="no input of the model tells 'layer'"):
        model(types.SimpleNamespace(x=x))


def test_a_sample_in_two_backward_passes(net):
    engine, x = BookKeeping(net, max_grad_norm=BOUND), drawn(3)
    loss = net(x).sum()
    loss.backward(retain_graph=True)
    kept = {name: p.grad.clone() for name, p in net.named_parameters()}
    for again in (lambda: loss.backward(retain_graph=True), lambda: net(x).sum().backward()):
        with pytest.raises(RuntimeError, match="count its samples twice"):
            again()
        assert all(torch.equal(p.grad, kept[name]) for name, p in net.named_parameters())
    net(drawn(3, seed=1)).sum().backward()
    net(x)  # is none
    x.copy_(drawn(3, seed=2))  # as where batches share memory
    net(x).sum().backward()
    assert engine.samples == 9
    net.zero_grad()
    engine.reset()
    net(x).sum().backward()
    assert engine.samples == 3


def test_an_interrupted_forward_pass(net):
    engine = BookKeeping(net, max_grad_norm=BOUND)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = net.register_forward_hook(interrupt, prepend=True)
    with pytest.raises(KeyboardInterrupt):
        net(drawn(3))
    handle.remove()
    engine.reset()
    net(drawn(2)).sum().backward()
    assert engine.samples == 2


def test_parameters_that_come_later():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False))
    BookKeeping(model)
    model[1].weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="'1.weight' became trainable"):
        model(torch.randn(2, 3)).sum().backward()
    model[1].weight.requires_grad_(False)
    model[0].weight = nn.Parameter(torch.randn(3, 3))
    with pytest.raises(RuntimeError, match="'weight' of '0' is not the one that was there"):
        model(torch.randn(2, 3))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpoints(net):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=True)

    model = Checkpointed()
    BookKeeping(model)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(drawn(2).requires_grad_()).sum().backward()
    assert all(p.grad is None for p in net.parameters())


def test_gradients_of_gradients_and_of_parameters(net):
    BookKeeping(net)
    loss = net(drawn(2)).sum()
    with pytest.raises(RuntimeError, match="call backward"):
        torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    with pytest.raises(RuntimeError, match="create_graph"):
        net(drawn(2)).sum().backward(create_graph=True)
    x = drawn(2).requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph"):  # its own gradient would lack that of weights
        torch.autograd.grad(net(x).sum(), x, create_graph=True)


@pytest.mark.filterwarnings("ignore")
def test_distributed_data_parallel(net, tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        BookKeeping(net)
        wrapped = nn.parallel.DistributedDataParallel(net)
        with pytest.raises(RuntimeError, match="use the model by itself"):
            wrapped(drawn(2))
        with pytest.raises(ValueError, match="use the model by itself"):
            BookKeeping(wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_models(net):
    """Graphs end at layers that are covered; one whole graph is refused."""
    x, scales = drawn(3), torch.ones(3)
    compiled = torch.compile(net, backend="eager")
    compiled(x)  # before gradients are taken over
    BookKeeping(net, max_grad_norm=BOUND)
    expected = backward(net, x, scales)
    actual = backward(compiled, x, scales)
    assert all(torch.equal(actual[f"_orig_mod.{name}"], expected[name]) for name in expected)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="[Oo]bserved exception"):
        torch.compile(net, backend="eager", fullgraph=True)(x)


def test_a_pass_that_failed_leaves_nothing(net):
    engine = BookKeeping(net, max_grad_norm=BOUND)
    expected = backward(net, drawn(3), torch.ones(3))
    x = drawn(3, seed=1).requires_grad_()
    x.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backward(net, x, torch.ones(3))
    actual = backward(net, drawn(3), torch.ones(3))
    assert all(torch.equal(actual[n], expected[n]) for n in actual) and engine.samples == 3
