"""What a loop leaves behind: its history, modules and optimizer, and how training goes on."""

import json
import math

import pytest
import torch

import fastreg
from fastreg.loops import (
    DivergedError,
    train_with_grad_clip_and_noise,
    train_with_weight_decay,
)

quiet = {"progress": False}


@pytest.mark.parametrize("first", [8, 5])
def test_goes_on_with_a_history(first, loader, mlp):
    """As if in one go: optimizer, rates and counts; the data starts anew."""
    options = {"lr": 1e-2, "schedule": fastreg.schedules.Linear(1.0, steps=16), **quiet}
    data = list(loader())
    full, parted = mlp(), mlp()
    once = train_with_weight_decay(full, data[:first] + data, **options)
    history = train_with_weight_decay(parted, data[:first], **options)
    history.seconds = 1000.0
    again = train_with_weight_decay(parted, data, history=history, **options)
    assert again is history and history.losses == once.losses and history.lr == once.lr
    assert history.seconds > 1000
    assert history.samples == once.samples and len(history.epochs) == 2
    assert all(map(torch.equal, full.parameters(), parted.parameters()))


def test_samplers_shuffle_anew_also_with_a_history(loader, mlp):
    class Sampler(torch.utils.data.SequentialSampler):
        epochs = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    net, data = mlp(), loader(count=64, sampler=Sampler(range(64)))
    history = train_with_weight_decay(net, data, lr=1e-2, epochs=2, **quiet)
    train_with_weight_decay(net, data, lr=1e-2, history=history, **quiet)
    assert Sampler.epochs == [0, 1, 2]


def test_an_interruption_keeps_what_there_is(gpt2, language):
    net, hooks = gpt2(), []

    def interrupt(history):
        hooks.append(sum(len(m._forward_hooks) for m in net.modules()))
        if history.steps == 3:
            raise KeyboardInterrupt

    net.eval()
    history = train_with_grad_clip_and_noise(net, language(), lr=1e-3, callback=interrupt, **quiet)
    assert history.interrupted and history.steps == 3 and len(history.grad_norm) == 3
    assert history.epochs == [pytest.approx(sum(history.losses) / 3)]
    assert not any(m.training for m in net.modules())
    assert sum(len(m._forward_hooks) for m in net.modules()) < hooks[0]
    assert all(p.grad is None for p in net.parameters())
    again = train_with_grad_clip_and_noise(net, language(2), lr=1e-3, history=history, **quiet)
    assert again.steps == 5 and not again.interrupted


def test_a_callback_ends_it(loader, mlp):
    history = train_with_weight_decay(
        mlp(), loader(), lr=1e-2, callback=lambda h: h.steps == 2, epochs=9, **quiet
    )
    assert history.steps == 2 and not history.interrupted and len(history.epochs) == 1


def test_modes_come_back(loader, mlp):
    net = mlp(0.5)
    net[3].eval()
    seen = []
    net[3].register_forward_hook(lambda module, *_: seen.append(module.training))
    train_with_weight_decay(net, loader(), lr=1e-2, max_steps=1, **quiet)
    assert seen == [True] and [m.training for m in net] == [True, True, True, False]


def test_a_loss_that_is_no_number(loader, mlp):
    net, batches = mlp(), list(loader())
    batches[2] = (torch.full_like(batches[2][0], math.nan), batches[2][1])
    kept = []
    with pytest.raises(DivergedError, match="nan at step 2") as caught:
        train_with_weight_decay(
            net,
            batches,
            lr=1e-2,
            callback=lambda h: kept.append([p.clone() for p in net.parameters()]),
            **quiet,
        )
    assert caught.value.history.steps == 2 and len(caught.value.history.losses) == 2
    assert all(map(torch.equal, net.parameters(), kept[-1]))


def test_history_as_plain_data(loader, mlp):
    history = train_with_weight_decay(mlp(), loader(), lr=1e-2, max_steps=2, **quiet)
    plain = json.loads(json.dumps(history.to_dict()))
    assert plain["steps"] == 2 and plain["losses"] == history.losses and "optimizer" not in plain
    assert plain["samples_per_second"] == pytest.approx(128 / history.seconds)
    assert "losses" in repr(history) and "model" not in repr(history)


def test_a_bar_where_tqdm_is_installed(capsys, loader, mlp):
    pytest.importorskip("tqdm")
    train_with_weight_decay(mlp(), loader(), lr=1e-2, max_steps=2)
    shown = capsys.readouterr().err
    assert "2/2" in shown and "loss=" in shown
    train_with_weight_decay(mlp(), loader(), lr=1e-2, max_steps=2, progress=False)
    assert capsys.readouterr().err == ""
