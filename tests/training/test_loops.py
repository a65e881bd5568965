"""The ready-made loops: batches, mixed precision, accumulation, clipping and noise."""

import contextlib
import functools
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import fastreg
from fastreg.loops import (
    train_with_grad_clip_and_noise,
    train_with_weight_decay,
)

quiet = {"progress": False}


def test_equals_a_loop_written_by_hand(close, loader, mlp):
    net, twin = mlp(), mlp()
    history = train_with_weight_decay(net, loader(), lr=1e-2, weight_decay=0.1, epochs=2, **quiet)
    weights = [p for p in twin.parameters() if p.dim() > 1]
    others = [p for p in twin.parameters() if p.dim() < 2]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    losses = []
    for _ in range(2):
        for x, y in loader():
            loss = F.cross_entropy(twin(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert history.losses == pytest.approx(losses, rel=1e-5)
    assert history.epochs == pytest.approx([sum(losses[:8]) / 8, sum(losses[8:]) / 8], rel=1e-5)
    assert history.steps == 16 and history.samples == 1024 and history.tokens == 0
    assert history.lr == [1e-2] * 16 and history.seconds > 0
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, fastreg.Lion, functools.partial(fastreg.SGD, momentum=0.9)]
)
def test_other_optimizers_learn(optimizer, loader, mlp):
    lr = {torch.optim.SGD: 1.0, fastreg.Lion: 1e-2}.get(optimizer, 0.1)
    history = train_with_weight_decay(mlp(), loader(), lr=lr, optimizer=optimizer, epochs=4, **quiet)
    assert history.epochs[-1] < 0.8 * history.epochs[0]


@pytest.mark.parametrize("kind", ["mapping", "pair", "nested", "one", "tensor"])
def test_kinds_of_batches(kind, Tiny):
    x, y = torch.arange(6.0), 3 * torch.arange(6.0)
    batch, model, loss_fn = {
        "mapping": ({"x": x, "labels": y}, Tiny(), None),
        "pair": ((x, y), Tiny(), F.mse_loss),
        "nested": (({"x": x}, y), Tiny(), F.mse_loss),
        "one": ([x], Tiny(), F.mse_loss),
        "tensor": (x, Tiny(), lambda outputs, inputs: F.mse_loss(outputs, 3 * inputs)),
    }[kind]
    history = train_with_weight_decay(
        model, [batch], lr=0.1, weight_decay=0.0, optimizer=torch.optim.SGD, loss_fn=loss_fn, **quiet
    )
    target = 1.0 if kind == "one" else 3.0
    assert history.losses == pytest.approx([float((x * (target - 1)).square().mean())])
    assert model.weight.item() == pytest.approx(1 + 0.2 * (target - 1) * float(x.square().mean()))
    assert history.samples == 6


def test_tokens_are_their_own_labels(gpt2, language):
    ids = language(1)[0]["input_ids"]
    history = train_with_weight_decay(gpt2(), [ids], lr=1e-3, **quiet)
    assert history.losses == [pytest.approx(math.log(40), rel=0.1)]


def test_tokens_count_without_padding(gpt2, language):
    history = train_with_weight_decay(gpt2(), language(3, padded=True), lr=1e-3, **quiet)
    assert history.samples == 12 and history.tokens == 3 * 4 * 6
    assert history.tokens_per_second == pytest.approx(history.tokens / history.seconds)


def test_a_loss_of_ones_own(loader, mlp):
    net, results = mlp(0.5), []

    def compute_loss(model, batch):
        assert model is net
        results.append(fastreg.r_drop(model, batch, 5.0))
        return results[-1].loss

    history = train_with_weight_decay(net, loader(), lr=1e-2, max_steps=2, compute_loss=compute_loss, **quiet)
    assert history.losses == [each.loss.item() for each in results] and len(results) == 2
    assert all(each.kl > 0 for each in results)


def test_accumulation_is_one_large_batch(loader, mlp, digits):
    """Also where the last window is shorter."""
    large, small = mlp(), mlp()
    options = {"lr": 0.1, "optimizer": torch.optim.SGD, **quiet}
    first = train_with_weight_decay(large, loader(64, 192), **options)
    second = train_with_weight_decay(small, loader(16, 192), accumulate=4, **options)
    assert second.losses == pytest.approx(first.losses, rel=1e-5) and second.steps == 3
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    rest = train_with_weight_decay(mlp(), loader(16, 80), accumulate=4, **options)
    whole = train_with_weight_decay(mlp(), [next(iter(loader(64, 80))), digits[64:80]], **options)
    assert rest.losses == pytest.approx(whole.losses, rel=1e-5)


def test_processes_share_gradients_once_a_step(loader, mlp):
    class Shared(nn.Sequential):
        alone, passes = False, []

        @contextlib.contextmanager
        def no_sync(self):
            self.alone = True
            yield
            self.alone = False

        def forward(self, x):
            self.passes.append(self.alone)
            return super().forward(x)

    net = Shared(mlp())
    train_with_weight_decay(net, loader(16, 80), lr=1e-2, accumulate=3, **quiet)
    assert net.passes == [True, True, False, True, False]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(amp, loader, mlp):
    seen = []
    net = mlp()
    net[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    history = train_with_grad_clip_and_noise(
        net, loader(), lr=1e-2, noise_factor=0.0, amp=amp, max_norm=0.5, epochs=3, **quiet
    )
    assert set(seen) == {torch.bfloat16 if amp == "bf16" else torch.float16}
    assert history.epochs[-1] < history.epochs[0] and net[0].weight.dtype == torch.float32
    assert (history.scaler is None) == (amp == "bf16")
    assert max(history.grad_norm) < 100  # unscaled


def test_rates_warm_up_and_follow_the_schedule(loader, mlp):
    history = train_with_weight_decay(
        mlp(), loader(), lr=0.01, warmup=3, schedule=fastreg.schedules.Linear(1.0, steps=8), **quiet
    )
    factors = [min(1, (t + 1) / 4) * (1 - t / 8) for t in range(8)]
    assert history.lr == pytest.approx([0.01 * f for f in factors])


def test_clips_and_tells_the_norm_before(loader, mlp):
    net = mlp()
    history = train_with_grad_clip_and_noise(
        net, loader(), lr=0.1, max_norm=1e-3, noise_factor=0, optimizer=fastreg.SGD, max_steps=1, **quiet
    )
    moved = math.sqrt(sum(float((p - q).detach().square().sum()) for p, q in zip(
        net.parameters(), mlp().parameters(), strict=True)))  # fmt: skip
    assert moved == pytest.approx(0.1 * 1e-3, rel=1e-2) and history.grad_norm[0] > 0.1


def test_noise_reaches_the_embeddings_and_is_gone_afterwards(gpt2, language):
    net, seen = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), []
    handle = net.transformer.drop.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    batch = language(1)[0]
    net.eval()
    net(**batch)
    clean = seen.pop()
    net.train()
    train_with_grad_clip_and_noise(net, [batch], lr=0.0, noise_factor=0.5, **quiet)
    noise = seen.pop() - clean
    assert 0.4 < float(noise.std()) < 0.6
    net(**batch)
    assert torch.equal(seen.pop(), clean)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()] == hooks
    handle.remove()


def test_noise_is_gone_after_a_failure(gpt2):
    net = gpt2()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    with pytest.raises(ValueError, match="labels"):
        train_with_grad_clip_and_noise(net, [{"input_ids": torch.zeros(1, 4).long()}], lr=1e-3, **quiet)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()] == hooks
    assert net.transformer.wte(torch.zeros(1).long()).equal(net.transformer.wte.weight[:1])
