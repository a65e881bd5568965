"""The ready-made loops: batches, mixed precision, accumulation, validation, and what they leave behind."""

import contextlib
import functools
import json
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastreg
from fastreg.loops import (
    DivergedError,
    History,
    fine_tune_with_adaptive_regularization,
    train_with_grad_clip_and_noise,
    train_with_weight_decay,
)

quiet = {"progress": False}


@functools.cache
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))


def loader(size=64, count=512, **options):
    return DataLoader(torch.utils.data.Subset(digits(), range(count)), batch_size=size, **options)


def mlp(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 10))


def gpt2(**rates):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0,
        **(rates or dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)),
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def language(count=6, padded=False):
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        ids = torch.randint(40, (4, 8), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
        if padded:
            batches[-1]["attention_mask"][:, 6:] = 0
    return batches


class Tiny(nn.Module):
    """One weight, and labels that it takes itself, as Hugging Face's models do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x, labels=None):
        y = self.weight * x
        return {"logits": y, "loss": None if labels is None else F.mse_loss(y, labels)}


# What is trained --------------------------------------------------------------------------------------------


def test_equals_a_loop_written_by_hand(close):
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
def test_other_optimizers_learn(optimizer):
    lr = {torch.optim.SGD: 1.0, fastreg.Lion: 1e-2}.get(optimizer, 0.1)
    history = train_with_weight_decay(mlp(), loader(), lr=lr, optimizer=optimizer, epochs=4, **quiet)
    assert history.epochs[-1] < 0.8 * history.epochs[0]


@pytest.mark.parametrize("kind", ["mapping", "pair", "nested", "one", "tensor"])
def test_kinds_of_batches(kind):
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


def test_tokens_are_their_own_labels():
    ids = language(1)[0]["input_ids"]
    history = train_with_weight_decay(gpt2(), [ids], lr=1e-3, **quiet)
    assert history.losses == [pytest.approx(math.log(40), rel=0.1)]


def test_tokens_count_without_padding():
    history = train_with_weight_decay(gpt2(), language(3, padded=True), lr=1e-3, **quiet)
    assert history.samples == 12 and history.tokens == 3 * 4 * 6
    assert history.tokens_per_second == pytest.approx(history.tokens / history.seconds)


def test_a_loss_of_ones_own():
    net, found = mlp(0.5), []

    def compute_loss(model, batch):
        assert model is net
        found.append(fastreg.r_drop(model, batch, 5.0))
        return found[-1].loss

    history = train_with_weight_decay(net, loader(), lr=1e-2, max_steps=2, compute_loss=compute_loss, **quiet)
    assert history.losses == [each.loss.item() for each in found] and len(found) == 2
    assert all(each.kl > 0 for each in found)


def test_accumulation_is_one_large_batch():
    """Also where the last window is shorter."""
    large, small = mlp(), mlp()
    options = {"lr": 0.1, "optimizer": torch.optim.SGD, **quiet}
    first = train_with_weight_decay(large, loader(64, 192), **options)
    second = train_with_weight_decay(small, loader(16, 192), accumulate=4, **options)
    assert second.losses == pytest.approx(first.losses, rel=1e-5) and second.steps == 3
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    rest = train_with_weight_decay(mlp(), loader(16, 80), accumulate=4, **options)
    whole = train_with_weight_decay(mlp(), [next(iter(loader(64, 80))), digits()[64:80]], **options)
    assert rest.losses == pytest.approx(whole.losses, rel=1e-5)


def test_processes_share_gradients_once_a_step():
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
def test_mixed_precision(amp):
    seen = []
    net = mlp()
    net[0].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    history = train_with_grad_clip_and_noise(
        net, loader(), lr=1e-2, noise_factor=0.0, amp=amp, max_norm=0.5, epochs=3, **quiet
    )
    assert set(seen) == {torch.bfloat16 if amp == "bf16" else torch.float16}
    assert history.epochs[-1] < history.epochs[0] and net[0].weight.dtype == torch.float32
    assert (history.scaler is None) == (amp == "bf16")
    assert max(history.grad_norm) < 100  # unscaled


def test_rates_warm_up_and_follow_the_schedule():
    history = train_with_weight_decay(
        mlp(), loader(), lr=0.01, warmup=3, schedule=fastreg.schedules.Linear(1.0, steps=8), **quiet
    )
    factors = [min(1, (t + 1) / 4) * (1 - t / 8) for t in range(8)]
    assert history.lr == pytest.approx([0.01 * f for f in factors])


def test_clips_and_tells_the_norm_before():
    net = mlp()
    history = train_with_grad_clip_and_noise(
        net, loader(), lr=0.1, max_norm=1e-3, noise_factor=0, optimizer=fastreg.SGD, max_steps=1, **quiet
    )
    moved = math.sqrt(sum(float((p - q).detach().square().sum()) for p, q in zip(
        net.parameters(), mlp().parameters(), strict=True)))  # fmt: skip
    assert moved == pytest.approx(0.1 * 1e-3, rel=1e-2) and history.grad_norm[0] > 0.1


def test_noise_reaches_the_embeddings_and_is_gone_afterwards():
    net, seen = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), []
    handle = net.transformer.drop.register_forward_hook(lambda module, given, out: seen.append(out.detach()))
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


def test_noise_is_gone_after_a_failure():
    net = gpt2()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    with pytest.raises(ValueError, match="labels"):
        train_with_grad_clip_and_noise(net, [{"input_ids": torch.zeros(1, 4).long()}], lr=1e-3, **quiet)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()] == hooks
    assert net.transformer.wte(torch.zeros(1).long()).equal(net.transformer.wte.weight[:1])


# Fine-tuning ------------------------------------------------------------------------------------------------


def test_dropout_falls_from_layer_to_layer_and_over_time():
    net, rates = gpt2(), []

    def look(history):
        rates.append([block.mlp.dropout.p for block in net.transformer.h])

    before = [block.mlp.dropout.p for block in net.transformer.h]
    history = fine_tune_with_adaptive_regularization(
        net, language(4), lr=1e-3, dropout=(0.1, 0.3), epochs=1, callback=look, **quiet
    )
    for step, found in enumerate(rates, 1):
        assert found == pytest.approx([rate * (1 - step / 4) for rate in (0.1, 0.2, 0.3)], abs=1e-6)
    assert [block.mlp.dropout.p for block in net.transformer.h] == before
    assert not hasattr(net.config, "fastreg") and all(
        type(m) is not fastreg.nn.Dropout for m in net.modules()
    )
    groups = history.optimizer.param_groups
    assert sorted({round(g["initial_lr"] / 1e-3, 6) for g in groups}) == pytest.approx(
        [0.9**4, 0.9**3, 0.9**2, 0.9, 1.0], abs=1e-6
    )
    state = history.optimizer.state[net.transformer.wte.weight]
    assert "l2_sp_start" in state and history.grad_norm and history.model is net


def test_learning_rates_fall_by_default():
    history = fine_tune_with_adaptive_regularization(gpt2(), language(3), lr=1e-3, epochs=3, **quiet)
    assert history.lr == pytest.approx([1e-3 * min(1, (t + 1) / 2) * (1 - t / 9) for t in range(9)])
    steady = fine_tune_with_adaptive_regularization(gpt2(), language(2), lr=1e-3, warmup=0, epochs=1, **quiet)
    assert steady.lr == [1e-3, 1e-3]


def test_fine_tuning_goes_on_with_a_history():
    """Rates fall over both trainings together, from where the first has come to."""
    net, options = gpt2(), {"lr": 1e-3, "dropout": (0.3, 0.3), "epochs": None, **quiet}
    history = fine_tune_with_adaptive_regularization(net, language(3), max_steps=3, **options)
    seen = []
    net.register_forward_pre_hook(lambda *_: seen.append(net.transformer.h[0].mlp.dropout.p))
    fine_tune_with_adaptive_regularization(net, language(3), max_steps=3, history=history, **options)
    assert history.steps == 6 and seen[-3:] == pytest.approx([0.15, 0.1, 0.05], abs=1e-6)
    assert history.lr[3:] == pytest.approx([0.5e-3, 1e-3 / 3, 1e-3 / 6])


def test_what_a_checkpoint_says_of_its_rates_stays(tmp_path):
    net = gpt2()
    fastreg.layerwise.set_dropout(net, 0.2)
    net.save_pretrained(tmp_path)
    net = type(net).from_pretrained(tmp_path)
    said = net.config.to_dict()["fastreg"]
    fine_tune_with_adaptive_regularization(net, language(1), epochs=1, **quiet)
    assert net.config.to_dict()["fastreg"] == said


def test_a_model_by_its_name(tmp_path):
    gpt2().save_pretrained(tmp_path)
    history = fine_tune_with_adaptive_regularization(str(tmp_path), language(2), epochs=1, **quiet)
    assert type(history.model).__name__ == "GPT2LMHeadModel" and history.steps == 2
    with pytest.raises(ValueError, match="AutoModelForNothing"):
        fine_tune_with_adaptive_regularization(
            str(tmp_path), language(2), auto_class="AutoModelForNothing", **quiet
        )


def test_what_fine_tuning_refuses():
    with pytest.raises(ValueError, match="repeated layers|dropout"):
        fine_tune_with_adaptive_regularization(mlp(), loader(), **quiet)
    with pytest.raises(ValueError, match="no length"):
        fine_tune_with_adaptive_regularization(gpt2(), iter(language(2)), **quiet)
    net = gpt2()
    fastreg.layerwise.set_dropout(net, 0.2)
    with pytest.raises(ValueError, match="set by fastreg.layerwise"):
        fine_tune_with_adaptive_regularization(net, language(2), **quiet)
    assert net.transformer.h[0].mlp.dropout.p == pytest.approx(0.2, abs=1e-5)


# Validation, averages, going on -----------------------------------------------------------------------------


def test_validates_under_the_averages():
    net = mlp(0.5)
    history = train_with_weight_decay(
        net, loader(), lr=0.05, epochs=2, validation=loader(50, 130), regularizers=[fastreg.EMA(0.9)], **quiet
    )
    net.eval()
    x, y = digits()[:130]
    with torch.no_grad(), history.optimizer.averaged():
        expected = F.cross_entropy(net(x), y).item()
    assert len(history.validation) == 2 and history.validation[-1] == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        assert abs(F.cross_entropy(net(x), y).item() - expected) > 1e-4


@pytest.mark.parametrize("first", [8, 5])
def test_goes_on_with_a_history(first):
    """As if in one go: optimizer, rates and counts; the data starts anew."""
    options = {"lr": 1e-2, "schedule": fastreg.schedules.Linear(1.0, steps=16), **quiet}
    data = list(loader())
    whole, parted = mlp(), mlp()
    once = train_with_weight_decay(whole, data[:first] + data, **options)
    history = train_with_weight_decay(parted, data[:first], **options)
    history.seconds = 1000.0
    again = train_with_weight_decay(parted, data, history=history, **options)
    assert again is history and history.losses == once.losses and history.lr == once.lr
    assert history.seconds > 1000
    assert history.samples == once.samples and len(history.epochs) == 2
    assert all(map(torch.equal, whole.parameters(), parted.parameters()))


def test_samplers_shuffle_anew_also_with_a_history():
    class Sampler(torch.utils.data.SequentialSampler):
        epochs = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    net, data = mlp(), loader(count=64, sampler=Sampler(range(64)))
    history = train_with_weight_decay(net, data, lr=1e-2, epochs=2, **quiet)
    train_with_weight_decay(net, data, lr=1e-2, history=history, **quiet)
    assert Sampler.epochs == [0, 1, 2]


def test_an_interruption_keeps_what_there_is():
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


def test_a_callback_ends_it():
    history = train_with_weight_decay(
        mlp(), loader(), lr=1e-2, callback=lambda h: h.steps == 2, epochs=9, **quiet
    )
    assert history.steps == 2 and not history.interrupted and len(history.epochs) == 1


def test_modes_come_back():
    net = mlp(0.5)
    net[3].eval()
    seen = []
    net[3].register_forward_hook(lambda module, *_: seen.append(module.training))
    train_with_weight_decay(net, loader(), lr=1e-2, max_steps=1, **quiet)
    assert seen == [True] and [m.training for m in net] == [True, True, True, False]


def test_a_loss_that_is_no_number():
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


def test_history_as_plain_data():
    history = train_with_weight_decay(mlp(), loader(), lr=1e-2, max_steps=2, **quiet)
    plain = json.loads(json.dumps(history.to_dict()))
    assert plain["steps"] == 2 and plain["losses"] == history.losses and "optimizer" not in plain
    assert plain["samples_per_second"] == pytest.approx(128 / history.seconds)
    assert "losses" in repr(history) and "model" not in repr(history)


def test_a_bar_where_tqdm_is_installed(capsys):
    pytest.importorskip("tqdm")
    train_with_weight_decay(mlp(), loader(), lr=1e-2, max_steps=2)
    shown = capsys.readouterr().err
    assert "2/2" in shown and "loss=" in shown
    train_with_weight_decay(mlp(), loader(), lr=1e-2, max_steps=2, progress=False)
    assert capsys.readouterr().err == ""


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be"),
        ({"epochs": None}, ValueError, "epochs= or max_steps="),
        ({"max_steps": 0}, ValueError, "max_steps must be"),
        ({"accumulate": 0}, ValueError, "accumulate must be"),
        ({"amp": "int8"}, ValueError, "amp must be"),
        ({"steps": 3}, TypeError, "steps"),
        ({"loss_fn": F.mse_loss, "compute_loss": F.mse_loss}, ValueError, "not both"),
        ({"optimizer": torch.optim.SGD, "regularizers": [fastreg.EMA(0.9)]}, TypeError, "no regularizers"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, TypeError, "must be a class"),
        ({"optimizer": lambda groups, lr: {}}, TypeError, "must make"),
        ({"optimizer": lambda g, lr: fastreg.SAM(g, fastreg.SGD, lr=lr)}, TypeError, "SAM needs two passes"),
        ({"schedule": 0.5}, TypeError, "schedule must be a function"),
        ({"loss_fn": lambda out, y: out}, ValueError, "one number"),
        ({"validation": []}, ValueError, "validation has no batches"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        train_with_weight_decay(mlp(), loader(64, 64), lr=1e-2, **options, **quiet)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "it is empty"),
        ([{"x": torch.zeros(2)}], ValueError, "no 'labels'"),
        ([torch.zeros(2)], ValueError, "loss_fn"),
        ([(torch.zeros(2), torch.zeros(2), torch.zeros(2))], TypeError, "3 parts"),
        (["text"], TypeError, "str"),
        ([(torch.zeros(2, 1), torch.zeros(2, 1))], ValueError, "no classification"),
        ([(torch.zeros(2, 1), torch.zeros(2).long())], ValueError, "no classification"),
        ([(torch.zeros(2, 3), torch.zeros(2))], ValueError, "no classification"),
    ],
)
def test_wrong_batches(batches, error, message):
    with pytest.raises(error, match=message):
        train_with_weight_decay(Tiny(), batches, lr=1e-2, **quiet)


def test_a_history_of_another_model():
    history = train_with_weight_decay(mlp(), loader(), lr=1e-2, max_steps=1, **quiet)
    model = history.model
    with pytest.raises(ValueError, match="of another model"):
        train_with_weight_decay(mlp(), loader(), lr=1e-2, history=history, **quiet)
    assert history.model is model and history.steps == 1


def test_a_model_without_loss_and_an_iterator_that_is_used_up():
    class Plain(nn.Linear):
        def forward(self, x, labels):
            return super().forward(x)

    with pytest.raises(ValueError, match="Plain has no loss"):
        train_with_weight_decay(
            Plain(2, 2), [{"x": torch.zeros(1, 2), "labels": torch.zeros(1)}], lr=0.1, **quiet
        )
    with pytest.raises(ValueError, match="after 1 epochs"):
        train_with_weight_decay(mlp(), iter(loader()), lr=1e-2, epochs=2, **quiet)
    with pytest.raises(TypeError, match="torch.nn.Module"):
        train_with_weight_decay("gpt2", loader(), lr=1e-2, **quiet)
    with pytest.raises(ValueError, match="noise_factor"):
        train_with_grad_clip_and_noise(gpt2(), language(1), lr=1e-2, noise_factor=-1.0, **quiet)


def test_an_empty_history():
    assert History().steps == 0 and math.isnan(History().samples_per_second)
