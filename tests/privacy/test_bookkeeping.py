"""Clipped sums of the engine against those of one sample at a time, layer by layer."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastreg.privacy.bookkeeping import BookKeeping
from fastreg.privacy.per_sample_grads import OuterProductGrad

WORDS, FEATURES, LENGTH = 50, 32, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, 4 * FEATURES)
        self.down = nn.Linear(4 * FEATURES, FEATURES)

    def forward(self, x):
        y = self.up(self.norm(x))
        y.relu_()  # in place
        return x + self.down(y)


class Model(nn.Module):
    """Positions without samples, blocks, a head that may be the embedding."""

    def __init__(self, tied=False, padding_idx=None, checkpoints=None):
        super().__init__()
        self.words = nn.Embedding(WORDS, FEATURES, padding_idx=padding_idx)
        self.positions = nn.Embedding(LENGTH, FEATURES)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, WORDS, bias=False)
        if tied:
            self.head.weight = self.words.weight
        self.checkpoints = checkpoints

    def forward(self, ids):
        x = self.words(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x) if self.checkpoints is None else checkpoint(block, x, use_reentrant=self.checkpoints)
        return self.head(self.norm(x))


def loss_of(model, ids, labels):
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())


def batch_of(samples, length=LENGTH):
    generator = torch.Generator().manual_seed(samples)
    return [torch.randint(WORDS, (samples, length), generator=generator) for _ in range(2)]


def build(make):
    torch.manual_seed(0)
    return make()


def squared(model, x):
    """A loss with gradients for outputs of any shape, a mean over samples."""
    out = model(x)
    target = torch.linspace(-1, 1, max(1, out[:1].numel())).sin().view(out.shape[1:])
    return (out - target).square().flatten(1).sum(1).mean()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("samples, length", [(5, 8), (8, 8), (1, 8), (4, 1), (2, 3)])
def test_language_model(OneByOne, tied, samples, length):
    """(8, 8): as many positions as samples, which has to be told."""
    model, batch = build(lambda: Model(tied)), batch_of(samples, length)
    expected = OneByOne(model, loss_of, batch, 0.5)
    shared = ("positions",) if samples == length else ()
    engine = BookKeeping(model, max_grad_norm=0.5, shared_inputs=shared)
    loss_of(model, *batch).backward()
    expected.check(model, engine.norms)
    assert engine.clipped_samples == samples == engine.samples and engine.nonfinite_samples == 0


def layer(make, *shape, integers=None):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, *shape, generator=generator)
    if integers:
        x = torch.randint(integers, (4, *shape), generator=generator)
    return pytest.param(make, x, id=f"{make().__class__.__name__}-{shape}")


LAYERS = [
    layer(lambda: nn.Linear(6, 5), 6),
    layer(lambda: nn.Linear(6, 5), 3, 6),
    layer(lambda: nn.Linear(6, 5, bias=False), 2, 3, 6),
    layer(lambda: nn.Linear(2, 3), 40, 2),  # formed
    layer(lambda: nn.Embedding(7, 5), integers=7),
    layer(lambda: nn.Embedding(7, 5, padding_idx=3), 30, integers=7),
    layer(lambda: nn.Embedding(7, 5), 4, 3, integers=7),
    layer(lambda: nn.LayerNorm(6), 3, 6),
    layer(lambda: nn.LayerNorm(6), 6),
    layer(lambda: nn.LayerNorm((4, 6), bias=False), 3, 4, 6),
    layer(lambda: nn.RMSNorm(6), 3, 6),
    layer(lambda: nn.GroupNorm(2, 6), 6, 3, 2),
    layer(lambda: nn.GroupNorm(2, 6), 6),
    layer(lambda: nn.InstanceNorm2d(6, affine=True), 6, 3, 2),
    layer(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), 4, 20),
    layer(lambda: nn.Conv1d(4, 6, 3, groups=2, padding="same"), 4, 9),
    layer(lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), 4, 7, 8),
    layer(lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False, padding=2, padding_mode="circular"), 4, 6, 5),
    layer(lambda: nn.Conv2d(40, 40, 2, padding_mode="reflect", padding=1), 40, 2, 2),  # not held
    layer(lambda: nn.Conv3d(2, 3, 2, padding=1), 2, 3, 4, 3),
]


@pytest.mark.parametrize("make, x", LAYERS)
@pytest.mark.parametrize("bound", [0.7, math.inf])
def test_layer(OneByOne, make, x, bound):
    """Half of the samples are clipped, or none: then gradients are the ordinary ones of the sum."""
    model = build(make)
    whole = OneByOne(model, squared, [x], math.inf)
    bound = float(torch.stack(whole.norms).median()) if bound < 1 else bound
    expected = OneByOne(model, squared, [x], bound)
    engine = BookKeeping(model, max_grad_norm=bound)
    squared(model, x).backward()
    expected.check(model, engine.norms)
    assert 0 <= engine.clipped_samples < 4


@pytest.mark.parametrize("make, x", LAYERS)
def test_several_uses_of_a_layer(OneByOne, make, x):
    """Cross terms count.  Norms are rounded up by more where there are more addends."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make()

        def forward(self, x):
            return self.layer(x) + 2 * self.layer(x.flip(-1) if x.dim() > 1 else 6 - x)

    model = build(Twice)
    expected = OneByOne(model, squared, [x], 0.3)
    engine = BookKeeping(model, max_grad_norm=0.3)
    for _ in range(2):  # the second time it is known
        model.zero_grad()
        squared(model, x).backward()
        expected.check(model, engine.norms, tolerance=2e-5)


def test_infinite_bound_gives_ordinary_gradients():
    model, batch = build(Model), batch_of(5)
    loss_of(model, *batch).backward()
    ordinary = [p.grad.clone() * 5 for p in model.parameters()]
    model.zero_grad()
    BookKeeping(model, max_grad_norm=math.inf)
    loss_of(model, *batch).backward()
    for p, expected in zip(model.parameters(), ordinary, strict=True):
        assert (p.grad - expected).abs().amax() <= 2e-6 * expected.abs().amax()


def test_sum_of_losses(OneByOne):
    model, batch = build(Model), batch_of(5)
    expected = OneByOne(model, loss_of, batch, 0.5)
    engine = BookKeeping(model, max_grad_norm=0.5, loss_reduction="sum")
    logits = model(batch[0]).transpose(1, 2)
    F.cross_entropy(logits, batch[1], reduction="none").mean(1).sum().backward()
    expected.check(model, engine.norms)


def test_micro_batches_add_up(OneByOne):
    model, batch = build(Model), batch_of(6)
    expected = OneByOne(model, loss_of, batch, 0.5)
    engine = BookKeeping(model, max_grad_norm=0.5)
    for first, last in ((0, 4), (4, 6), (6, 6)):  # the last one is empty
        loss_of(model, *(t[first:last] for t in batch)).backward()
    expected.check(model, None)
    assert engine.samples == 6
    model.zero_grad()
    loss_of(model, *(t[:2] for t in batch)).backward()
    assert engine.samples == 2


def test_no_samples():
    model = build(Model)
    engine = BookKeeping(model)
    loss_of(model, *batch_of(0)).backward()
    assert engine.norms.shape == (0,) and engine.samples == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


@pytest.mark.parametrize("how", ["number", "mapping", "sequence", "tensor"])
def test_bounds_by_parameter(OneByOne, how):
    model, batch = build(lambda: Model(tied=True)), batch_of(5)
    names = [name for name, _ in model.named_parameters()]
    share = 0.5 / math.sqrt(len(names))
    bounds = {name: share if how == "number" else 0.01 * (i + 1) for i, name in enumerate(names)}
    max_grad_norm = {
        "number": 0.5, "mapping": bounds, "sequence": list(bounds.values()),
        "tensor": [torch.tensor(bound) for bound in bounds.values()],
    }[how]  # fmt: skip
    expected = OneByOne(model, loss_of, batch, bounds)
    engine = BookKeeping(model, max_grad_norm=max_grad_norm, clipping="per_layer")
    loss_of(model, *batch).backward()
    expected.check(model, engine.norms)
    assert float(engine.sensitivity) == pytest.approx(math.hypot(*bounds.values()))


def test_bound_may_change(OneByOne):
    model, batch = build(Model), batch_of(5)
    engine = BookKeeping(model, attach=False)
    for bound in (0.5, torch.tensor(0.2)):
        expected = OneByOne(model, loss_of, batch, float(bound))
        engine.max_grad_norm = bound
        engine.attach()
        loss_of(model, *batch).backward()
        expected.check(model, engine.norms)
        engine.detach()


def test_frozen_parameters_are_left_alone(OneByOne):
    model, batch = build(Model), batch_of(5)
    for p in [*model.blocks[0].parameters(), model.blocks[1].up.weight, model.norm.bias]:
        p.requires_grad_(False)
    expected = OneByOne(model, loss_of, batch, 0.5)
    engine = BookKeeping(model, max_grad_norm=0.5)
    loss_of(model, *batch).backward()
    expected.check(model, engine.norms)
    assert model.norm.bias.grad is None and len(engine.parameters) == len(expected.sums)
    model.words.weight.requires_grad_(False)  # later, too
    expected = OneByOne(copy.deepcopy(model), loss_of, batch, 0.5)
    model.zero_grad()
    loss_of(model, *batch).backward()
    expected.check(model, engine.norms)


def test_samples_in_the_second_dimension(OneByOne):
    model = build(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)))
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0))
    expected = OneByOne(model, squared, [x], 0.5)
    engine = BookKeeping(model, max_grad_norm=0.5, batch_dim=1)
    squared(lambda x: model(x.transpose(0, 1)).transpose(0, 1), x).backward()
    expected.check(model, engine.norms)


@pytest.mark.parametrize("reuse", [False, True])
def test_one_loss_of_two_passes(OneByOne, reuse):
    """As R-Drop has it: a sample's gradient is that of both passes."""
    model, batch = build(lambda: Model(tied=reuse)), batch_of(4)

    def twice(model, ids, labels):
        return loss_of(model, ids, labels) + 0.5 * loss_of(model, ids.flip(1), labels)

    expected = OneByOne(model, twice, batch, 0.5)
    engine = BookKeeping(model, max_grad_norm=0.5)
    twice(model, *batch).backward()
    expected.check(model, engine.norms, tolerance=2e-5)


def test_graph_that_is_kept(OneByOne):
    model, batch = build(Model), batch_of(4)
    expected = OneByOne(model, loss_of, batch, 0.5)
    engine = BookKeeping(model, max_grad_norm=0.5)
    loss = loss_of(model, *batch)
    loss.backward(retain_graph=True)
    expected.check(model, engine.norms)
    model.zero_grad()
    loss.backward()
    expected.check(model, engine.norms)


def test_checkpoints(OneByOne):
    model, batch = build(lambda: Model(tied=True, checkpoints=False)), batch_of(4)
    expected = OneByOne(model, loss_of, batch, 0.5)
    engine = BookKeeping(model, max_grad_norm=0.5)
    loss_of(model, *batch).backward()
    expected.check(model, engine.norms)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_are_precise_whatever_is_set(OneByOne, precision, monkeypatch):
    model = build(lambda: nn.Sequential(nn.Linear(64, 64), nn.Conv1d(8, 8, 3)))
    x = torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(0))
    expected = OneByOne(model, squared, [x], 0.5)
    engine = BookKeeping(model, max_grad_norm=0.5)
    loss = squared(model, x)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        settings = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
        chosen = [setting.fp32_precision for setting in settings]
        seen, sums = [], OuterProductGrad.weighted_sum
        monkeypatch.setattr(
            OuterProductGrad,
            "weighted_sum",
            lambda *args: seen.append(settings[0].fp32_precision) or sums(*args),
        )
        loss.backward()
        assert seen == ["ieee"] and [setting.fp32_precision for setting in settings] == chosen
    finally:
        torch.set_float32_matmul_precision(before)
    expected.check(model, engine.norms)


def test_autocast(OneByOne):
    """Norms are those of what is summed, in float32: a bound holds although activations have 8 bits."""
    model, batch = build(Model), batch_of(4)
    reference = OneByOne(model, loss_of, batch, math.inf)
    engine = BookKeeping(model, max_grad_norm=0.5)
    for i in range(4):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, *(t[i : i + 1] for t in batch))
            loss.backward()  # within autocast, as many have it
        total = torch.stack([p.grad.double().norm() for p in model.parameters()]).norm()
        assert total <= 0.5 * (1 + 2**-20) and total >= 0.49
        assert abs(engine.norms / reference.norms[i] - 1) < 0.05
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_parameters_of_16_bits():
    model, batch = build(Model).bfloat16(), batch_of(4)
    before = [p.grad_dtype for p in model.parameters()]
    engine = BookKeeping(model, max_grad_norm=0.5)
    for i in range(4):
        model.zero_grad()
        loss_of(model, *(t[i : i + 1] for t in batch)).backward()
        assert all(p.grad.dtype == torch.float32 and p.requires_grad for p in model.parameters())
        total = torch.stack([p.grad.double().norm() for p in model.parameters()]).norm()
        assert 0.49 <= total <= 0.5 * (1 + 2**-20)
    engine.detach()
    assert [p.grad_dtype for p in model.parameters()] == before
    loss_of(model, *batch).backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())


def test_double_precision(OneByOne):
    model, batch = build(lambda: Model(tied=True)).double(), batch_of(4)
    expected = OneByOne(model, loss_of, batch, 0.5)
    engine = BookKeeping(model, max_grad_norm=0.5)
    loss_of(model, *batch).backward()
    expected.check(model, engine.norms, tolerance=2e-6)


def test_detached_model_is_as_before():
    model, batch = build(Model), batch_of(4)
    loss_of(model, *batch).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    engine = BookKeeping(model)
    model.zero_grad()
    loss_of(model, *batch).backward()
    engine.detach()
    model.zero_grad()
    loss_of(model, *batch).backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_ordinary_models(how):
    model, batch = build(Model), batch_of(4)
    loss_of(model, *batch).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    BookKeeping(model)
    if how == "deepcopy":
        clone = copy.deepcopy(model)
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        clone = torch.load(file, weights_only=False)
    loss_of(clone, *batch).backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(clone.parameters(), expected, strict=True))
    assert all(p.grad is None for p in model.parameters())
    clone.zero_grad()
    engine = BookKeeping(clone, max_grad_norm=math.inf)  # which can be clipped in their turn
    loss_of(clone, *batch).backward()
    assert engine.samples == 4
    engine.detach()
    assert not any("forward" in vars(module) for module in clone.modules())


def test_gradients_of_inputs_alone():
    """As adversarial training asks for them: they are the ordinary ones, and nothing is summed."""
    model = build(lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (expected,) = torch.autograd.grad(squared(model, x), x)
    engine = BookKeeping(model)
    (actual,) = torch.autograd.grad(squared(model, x), x)
    assert torch.allclose(actual, expected, rtol=1e-5) and engine.norms is None
    squared(model, x).backward(inputs=[model[0].bias])
    assert model[0].bias.grad is not None and model[0].weight.grad is None


def test_evaluation_is_left_alone():
    model, batch = build(Model), batch_of(4)
    expected = model(batch[0])
    BookKeeping(model)
    with torch.no_grad():
        assert torch.equal(model(batch[0]), expected)
        assert model.blocks[0].up.weight.requires_grad
