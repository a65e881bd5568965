"""Recipes: as data, at work field by field, all together, and what they refuse."""

import copy
import dataclasses
import pickle
import re

import pytest
import torch

import fastreg
from fastreg import Regularization
from fastreg.recipe.callbacks import Callbacks
from fastreg.recipe.sections import SECTIONS

transformers = pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")

FULL = {
    "optimizer": {"name": "adamw", "betas": [0.8, 0.9], "bf16": "nearest"},
    "weight_decay": {"rate": 0.1, "kind": "independent", "exclude": True},
    "lr_decay": {"rate": 0.8},
    "dropout": [
        {"layers": "linear", "base": 0.1, "increase": 0.1, "annealing": {"schedule": "cosine", "steps": 0.5}},
        {"roles": ["attention"], "rate": 0.2},
    ],
    "clip": {"max_norm": 1.0, "value": 0.5, "adaptive": 0.1},
    "gradient_noise": {"std": 0.01, "gamma": 0.55, "relative": True},
    "embedding_noise": {"alpha": 5.0, "annealing": {"schedule": "linear", "end": 0.5, "steps": 3}},
    "activation_noise": {"std": 0.05, "kind": "multiplicative"},
    "token_noise": {"rate": 0.1, "special_tokens": [0, 1]},
    "weight_noise": {"std": 0.01, "relative": True},
    "adversarial": {"method": "fgm", "epsilon": 0.5},
    "r_drop": {"alpha": 1.0},
    "sam": {"rho": 0.05, "adaptive": "weights", "eta": 0.01, "interval": 2},
    "lookahead": {"k": 2, "alpha": 0.5},
    "ema": [{"decay": 0.9, "name": "fast"}, {"decay": 0.99, "name": "slow_ema", "start": 0.5}],
    "swa": {"start": 0.5, "every": 1},
    "l1": {"strength": 1e-4},
    "l2sp": {"strength": 1e-3},
}
TOKENS = torch.arange(24).view(3, 8) % 16


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other cost seconds here where other tests run beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gpt2(rate=0.0):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=16, n_positions=8, resid_pdrop=rate, embd_pdrop=rate,
        attn_pdrop=rate, bos_token_id=None, eos_token_id=None, loss_type="ForCausalLMLoss",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).train()


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=16, vocab_size=16,
        max_position_embeddings=8, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def loss_of(model):
    return lambda: model(input_ids=TOKENS, labels=TOKENS).loss


def train(model, optimizer, callbacks, steps):
    losses = []
    for _ in range(steps):
        losses.append(callbacks.training_step(loss_of(model), optimizer).item())
        callbacks.step()
    return losses


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def trained(recipe, steps=3, model=None):
    """Weights and losses of a few steps, and what made them."""
    model = gpt2() if model is None else model
    optimizer, callbacks = Regularization.from_dict(recipe).apply(model, lr=0.01, steps=steps, seed=1)
    torch.manual_seed(2)
    losses = train(model, optimizer, callbacks, steps)
    return weights(model), losses, optimizer, callbacks


def snapshot(model):
    """All of a model that a recipe might change."""
    inside = {
        name: (
            type(module), id(module), module.training, len(module._forward_hooks),
            len(module._forward_pre_hooks), getattr(module, "p", None),
        )
        for name, module in model.named_modules()
    }  # fmt: skip
    return inside, model.config.to_dict(), [p.tolist() for p in model.parameters()]


# As data ------------------------------------------------------------------------------------------------


def test_round_trips(tmp_path):
    recipe = Regularization.from_dict(FULL)
    assert recipe.to_dict() == FULL
    assert set(FULL) == {f.name for f in dataclasses.fields(Regularization)} - {"msam"}
    for text in (recipe.to_yaml(), recipe.to_yaml(tmp_path / "r.yaml")):
        assert Regularization.from_dict(yaml.safe_load(text)) == recipe
    assert Regularization.from_yaml(tmp_path / "r.yaml") == recipe
    assert pickle.loads(pickle.dumps(recipe)) == copy.deepcopy(recipe) == recipe
    assert dataclasses.replace(recipe, clip=2) != recipe


def test_short_forms_and_numbers_as_text():
    """YAML 1.1 takes 1e-3 for text, and `on` for true."""
    recipe = Regularization.from_dict(
        yaml.safe_load("{clip: 1e-1, ema: on, sam: off, lookahead: '4', optimizer: sgd, swa: 3, l1: 1e-3}")
    )
    assert recipe.to_dict() == {
        "optimizer": {"name": "sgd"}, "clip": {"max_norm": 0.1}, "lookahead": {"k": 4}, "ema": {},
        "swa": {"start": 3}, "l1": {"strength": 0.001},
    }  # fmt: skip
    assert Regularization() == Regularization.from_dict({}) == Regularization(clip=None)


def test_a_recipe_tells_what_is_on():
    told = str(
        Regularization(clip=1.0, dropout={"layers": "linear", "annealing": {"end": 0.1}, "inject": True})
    )
    assert told.splitlines() == [
        "optimizer  name adamw",
        "dropout    layers linear, annealing end 0.1, inject yes",
        "clip       max_norm 1",
    ]


def test_what_is_given_is_not_shared():
    given = {"ema": {"decay": 0.5}}
    recipe = Regularization.from_dict(given)
    recipe.to_dict()["ema"]["decay"] = 0.1
    given["ema"]["decay"] = 0.2
    assert recipe.ema == {"decay": 0.5}


WRONG = [
    ({"clp": 1}, "a recipe has no field 'clp'; did you mean 'clip'? There are optimizer, weight_decay"),
    ({"clip": {"max_nrm": 1}}, "clip: unknown setting 'max_nrm'; did you mean 'max_norm'?"),
    ({"dropout": {"annealing": {"stop": 1}}}, "dropout.annealing: unknown setting 'stop'"),
    ({"dropout": [{"rate": 0.1}, {"rat": 0.1}]}, "dropout[1]: unknown setting 'rat'"),
    ({"clip": -1}, "clip: max_norm must be > 0, got max_norm=-1.0"),
    ({"clip": {"value": -1}}, "clip.value: clip_value must be finite and >= 0"),
    ({"clip": "much"}, "clip must be a number, got 'much'"),
    ({"clip": {"norm_type": 2}}, "norm_type goes with max_norm"),
    ({"clip": [1, 2]}, "clip must be a number, got [1, 2]"),
    ({"optimizer": "adamv"}, "optimizer must be one of 'adamw', 'adam', 'sgd', 'lion', got 'adamv'"),
    ({"optimizer": {"name": "sgd", "betas": [0, 0]}}, "optimizer: sgd has no option 'betas'"),
    ({"optimizer": {"betas": [0.9, 1.5]}}, "optimizer: Invalid beta parameter at index 1: 1.5"),
    ({"optimizer": {"lr": 1e-3}}, "optimizer: unknown setting 'lr'"),
    ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
    ({"weight_decay": {"kind": "l3"}}, "weight_decay.kind must be one of 'decoupled', 'l2'"),
    ({"weight_decay": {"exclude": 1}}, "weight_decay.exclude must be true or false, got 1"),
    ({"lr_decay": 1.5}, "lr_decay: rate must be in (0, 1], got rate=1.5"),
    ({"dropout": 1.5}, "dropout: rate must be a number in [0, 1], got 1.5"),
    ({"dropout": {"layers": "linear", "rate": 0.1}}, "either a rate or layers: 'linear'"),
    ({"dropout": {"base": 0.1}}, "base goes with layers: linear"),
    ({"dropout": {"roles": "hiden"}}, "dropout.roles: roles must be among 'hidden'"),
    (
        {"dropout": {"annealing": {"start": 2}}},
        "dropout.annealing: start must be a number in [0, 1], got 2.0",
    ),
    ({"dropout": {"annealing": {"steps": 1.5}}}, "must be a whole number of steps, or a share of the run"),
    ({"dropout": {"annealing": {"schedule": "early", "end": 0.1}}}, "early has no end"),
    ({"dropout": {"rate": 0.1, "levels": 3}}, "levels goes with annealing"),
    ({"gradient_noise": -1}, "gradient_noise: std must be finite and >= 0"),
    ({"embedding_noise": {"alpha": 1, "std": 1}}, "give either alpha or std"),
    ({"embedding_noise": -1}, "embedding_noise: alpha must be"),
    ({"activation_noise": -1}, "activation_noise: std must be"),
    ({"token_noise": 2}, "token_noise: rate must be"),
    ({"weight_noise": -1}, "weight_noise: std must be"),
    ({"adversarial": {"epsilon": -1}}, "adversarial: epsilon must be"),
    ({"adversarial": "pgd"}, "adversarial must be one of 'fgm', got 'pgd'"),
    ({"r_drop": -1}, "r_drop: alpha must be"),
    ({"sam": {"rho": -1}}, "rho must be finite and >= 0"),
    ({"sam": {"interval": 1.5}}, "sam.interval must be a whole number, got 1.5"),
    ({"sam": True, "msam": True}, "sam and msam both perturb the weights"),
    ({"msam": 0.3, "optimizer": "lion"}, "MSAM needs momentum"),
    ({"msam": 0.3, "weight_decay": {"kind": "cautious"}}, "MSAM does not go with decay='cautious'"),
    ({"ema": 1.0}, "ema: decay must be in [0, 1)"),
    ({"ema": [{"decay": 0.9}, {"decay": 0.99}]}, "each average needs a name of its own, got 'ema'"),
    ({"ema": {"name": "swa"}}, "each average needs a name of its own, got 'swa'"),
    ({"lookahead": {"alpha": 2}}, "alpha must be in [0, 1]"),
    ({"l1": -1}, "l1: strength must be"),
    ({"l2sp": -1}, "l2sp: strength must be"),
    ("clip", "a recipe is a mapping of fields to settings, got 'clip'"),
]


@pytest.mark.parametrize("settings, said", WRONG, ids=lambda value: str(value)[:60])
def test_what_cannot_be_is_refused_when_it_is_made(settings, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Regularization.from_dict(settings)


def test_errors_of_a_file_name_it(tmp_path):
    path = tmp_path / "broken.yaml"
    for text, said in (
        ("clip: [", "broken.yaml: while parsing"),
        ("clip: -1", "broken.yaml: clip: max_norm"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=said):
            Regularization.from_yaml(path)
    path.write_text("", encoding="utf-8")
    assert Regularization.from_yaml(path) == Regularization()
    with pytest.raises(FileNotFoundError):
        Regularization.from_yaml(tmp_path / "none.yaml")


def test_without_pyyaml_the_fix_is_told(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match="pip install pyyaml, or use from_dict"):
        Regularization().to_yaml()


# At work ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain():
    return trained({})


ALONE = {
    "optimizer": "sgd",
    "weight_decay": 0.5,
    "lr_decay": 0.5,
    "dropout": 0.5,
    "clip": 0.1,
    "gradient_noise": 0.1,
    "embedding_noise": 5,
    "activation_noise": 0.2,
    "token_noise": 0.5,
    "weight_noise": 0.1,
    "adversarial": True,
    "sam": 0.5,
    "msam": 0.5,
    "lookahead": {"k": 2},
    "l1": 0.5,
    "l2sp": 0.5,
}


@pytest.mark.parametrize("name", ALONE)
def test_each_field_alone_takes_effect(name, plain):
    after, *_ = trained({name: ALONE[name]})
    assert not all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(after, plain[0], strict=True))


def test_nothing_on_is_plain_adamw(plain):
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    losses = []
    for _ in range(3):
        loss = loss_of(model)()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert plain[1] == pytest.approx(losses, rel=1e-6)
    assert plain[3] == []


@pytest.mark.parametrize("name, of", [("ema", {"decay": 0.5}), ("swa", {"start": 2}), ("swa", 0.5)])
def test_averages_are_evaluated_and_leave_training_alone(name, of, plain):
    after, losses, optimizer, _ = trained({name: of})
    assert losses == plain[1] and all(map(torch.equal, after, plain[0]))
    with optimizer.averaged():
        shown = [p.clone() for group in optimizer.param_groups for p in group["params"]]
    assert not all(map(torch.equal, shown, after))


def test_of_several_averages_ema_is_evaluated_first():
    _, _, optimizer, _ = trained(
        {"lookahead": 2, "swa": 1, "ema": [{"decay": 0.5, "name": "a"}, {"name": "b"}]}
    )
    optimizer.eval()
    assert optimizer.param_groups[0]["averaged"] == "a"
    optimizer.train()


def test_groups_decay_weights_only_and_layers_learn_at_their_pace():
    _, _, optimizer, _ = trained({"weight_decay": 0.1})
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(p.dim() < 2 for p in optimizer.param_groups[1]["params"])
    _, _, optimizer, _ = trained({"weight_decay": {"rate": 0.1, "exclude": False}, "lr_decay": 0.5})
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.00125, 0.0025, 0.005, 0.01]
    _, _, optimizer, _ = trained({"sam": {"perturb": "norms", "rho": 0.1}})
    assert {group["rho"] for group in optimizer.param_groups} == {0.0, 0.1}
    _, _, optimizer, _ = trained({"sam": {"adaptive": "weights", "rho": 0.1}})
    assert [group["adaptive"] for group in optimizer.param_groups] == [True, False]


def test_options_reach_the_optimizer():
    recipe = {"optimizer": {"name": "sgd", "momentum": 0.9, "nesterov": True, "state_dtype": "bfloat16"}}
    _, _, optimizer, _ = trained(recipe | {"weight_decay": {"rate": 0.1, "kind": "cautious"}})
    assert isinstance(optimizer, fastreg.SGD) and optimizer.param_groups[0]["nesterov"]
    state = next(iter(optimizer.state.values()))
    assert state["momentum_buffer"].dtype == torch.bfloat16
    assert optimizer._decay_kind == "cautious"


def test_dropout_by_layer_role_and_step():
    model = gpt2()
    recipe = Regularization(
        dropout=[
            {"layers": "linear", "base": 0.2, "increase": 0.2, "annealing": {"start": 1.0, "steps": 0.5}},
            {"roles": "embedding", "rate": 0.3},
        ]
    )  # fmt: skip
    _, callbacks = recipe.apply(model, lr=0.1, steps=8)
    found = []
    for _ in range(5):
        found.append([block.mlp.dropout.p for block in model.transformer.h])
        callbacks.step()
    expected = [[0.2 * share, 0.4 * share] for share in (1, 0.75, 0.5, 0.25, 0)]
    assert found == [pytest.approx(rates) for rates in expected]
    assert model.transformer.drop.p == 0.3
    _, other = recipe.apply(model, lr=0.1, steps=8)
    other.load_state_dict({"dropout": {"last_step": [2]}})
    assert model.transformer.h[1].mlp.dropout.p == pytest.approx(0.2)


@pytest.mark.parametrize("schedule, expected", [("early", [0.3, 0.3, 0.0]), ("late", [0.0, 0.0, 0.3])])
def test_early_and_late_dropout(schedule, expected):
    model = gpt2()
    times = {"schedule": schedule, "start": 0.3, "steps": 2}
    _, callbacks = Regularization(dropout={"annealing": times}).apply(model, lr=0.1)
    found = []
    for _ in range(3):
        found.append(model.transformer.h[0].mlp.dropout.p)
        callbacks.step()
    assert found == expected


def test_dropout_is_injected_where_there_is_none():
    model = llama()
    with pytest.raises(ValueError, match="dropout: LlamaForCausalLM has no 'hidden' dropout.*inject=True"):
        Regularization(dropout=0.1).apply(model)
    _, callbacks = Regularization(dropout={"rate": 0.1, "inject": True}).apply(model)
    assert model.model.layers[1].mlp.fastreg_dropout.p == 0.1
    callbacks.remove()
    assert not hasattr(model.model.layers[1].mlp, "fastreg_dropout")


def test_noise_is_annealed():
    model = gpt2()
    times = {"steps": 2}
    recipe = Regularization(
        embedding_noise={"alpha": 4, "annealing": times}, token_noise={"rate": 0.5, "annealing": times},
        activation_noise={"std": 0.2, "annealing": times}, weight_noise={"std": 0.2, "annealing": times},
    )  # fmt: skip
    optimizer, callbacks = recipe.apply(model, lr=0.0)
    by_name = {callback.name: callback for callback in callbacks}

    def levels():
        return (
            by_name["embedding_noise"]._attached.alpha, by_name["token_noise"]._attached.rate,
            by_name["activation_noise"]._attached.std, by_name["weight_noise"]._noise.std,
        )  # fmt: skip

    assert levels() == (4, 0.5, 0.2, 0.2)
    train(model, optimizer, callbacks, 1)
    assert levels() == pytest.approx((2, 0.25, 0.1, 0.1))
    clean = loss_of(gpt2())().item()
    train(model, optimizer, callbacks, 1)
    assert levels() == (0, 0, 0, 0)
    assert train(model, optimizer, callbacks, 1) == [clean]


def test_token_noise_leaves_labels_and_special_tokens():
    model = gpt2()
    seen = []
    model.transformer.wte.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    _, callbacks = Regularization(token_noise={"rate": 1.0, "special_tokens": list(range(14))}).apply(model)
    loss_of(model)()
    assert torch.equal(seen[-1][TOKENS < 14], TOKENS[TOKENS < 14])
    assert set(seen[-1][TOKENS >= 14].tolist()) <= {14, 15}
    everything, _ = Regularization(token_noise=1.0).apply(gpt2())
    model.eval()
    loss_of(model)()
    assert torch.equal(seen[-1], TOKENS), "none while evaluating"
    callbacks.remove()
    model.train()
    loss_of(model)()
    assert torch.equal(seen[-1], TOKENS)


def test_activation_noise_goes_where_the_pattern_says():
    model = gpt2()
    _, callbacks = Regularization(activation_noise=0.1).apply(model)
    names = callbacks[0]._attached.names
    assert names == (
        "transformer.h.0.attn",
        "transformer.h.0.mlp",
        "transformer.h.1.attn",
        "transformer.h.1.mlp",
    )
    _, callbacks = Regularization(activation_noise={"std": 0.1, "pattern": "*.h.*.ln_?"}).apply(gpt2())
    assert len(callbacks[0]._attached.names) == 4
    with pytest.raises(ValueError, match="activation_noise: '\\*.nothing' matches no module"):
        Regularization(activation_noise={"pattern": "*.nothing"}).apply(gpt2())
    with pytest.raises(
        ValueError, match="activation_noise: found no attention or MLP in repeated layers of Linear"
    ):
        Regularization(activation_noise=True).apply(torch.nn.Linear(2, 2))


def test_r_drop_is_that_of_two_passes():
    model = gpt2(0.3)
    optimizer, callbacks = Regularization(optimizer="sgd", r_drop=2.0).apply(model, lr=0.0)
    torch.manual_seed(5)
    value = callbacks.gradients(loss_of(model))
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(5)
    logits, logits2 = (model(input_ids=TOKENS).logits[:, :-1] for _ in range(2))
    expected = fastreg.losses.r_drop_loss(logits, logits2, TOKENS[:, 1:], alpha=2.0)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-7)


def test_r_drop_over_micro_batches_counts_items_once():
    """As the Trainer does it: every loss is a share of the items in all micro-batches."""
    model = gpt2(0.3)
    _, callbacks = Regularization(r_drop=2.0).apply(model)
    labels = TOKENS.clone()
    labels[0, 5:] = -100
    arguments = {"input_ids": TOKENS, "labels": labels, "num_items_in_batch": 60}
    torch.manual_seed(5)
    value = callbacks.gradients(lambda: model(**arguments).loss)
    torch.manual_seed(5)
    logits, logits2 = (model(input_ids=TOKENS).logits[:, :-1] for _ in range(2))
    expected = fastreg.losses.r_drop_loss(logits, logits2, labels[:, 1:], alpha=2.0, reduction="sum") / 60
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(RuntimeError, match="one call of the model in each evaluation of the loss, got 4"):
        callbacks.gradients(lambda: model(**arguments).loss + model(**arguments).loss)


def test_adversarial_gradients_are_added():
    model = gpt2()
    _, callbacks = Regularization(optimizer="sgd", adversarial={"epsilon": 0.5}).apply(model, lr=0.0)
    before = weights(model)
    callbacks.gradients(loss_of(model))
    found = [p.grad.clone() for p in model.parameters()]
    assert all(map(torch.equal, before, weights(model)))
    model.zero_grad()
    embedding = model.transformer.wte.weight
    loss_of(model)().backward()
    clean = [p.grad.clone() for p in model.parameters()]
    with torch.no_grad():
        embedding += 0.5 * embedding.grad / embedding.grad.norm()
    model.zero_grad()
    loss_of(model)().backward()
    for a, b, p in zip(found, clean, model.parameters(), strict=True):
        torch.testing.assert_close(a, b + p.grad, rtol=1e-4, atol=1e-6)


def test_sharpness_aware_steps_take_one_pass_where_none_is_due():
    calls = []
    model = gpt2()
    optimizer, callbacks = Regularization(sam={"rho": 0.1, "interval": 2, "start_step": 0.25}).apply(
        model, lr=0.01, steps=4
    )

    def loss():
        calls.append(1)
        return loss_of(model)()

    counts = []
    for _ in range(4):
        calls.clear()
        callbacks.training_step(loss, optimizer)
        counts.append(len(calls))
    assert counts == [1, 2, 1, 2]


def test_a_step_of_sam_is_two_passes_under_one_watch():
    weight = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        weight.weight.fill_(3.0)
    optimizer, callbacks = Regularization(optimizer="sgd", sam=0.5).apply(weight, lr=0.1)
    seen = []

    def loss():
        seen.append(weight.weight.item())
        return (weight.weight**2).sum() / 2

    class Watch(list):
        def __enter__(self):
            self.append(weight.weight.item())

        def __exit__(self, *_):
            self.append(weight.weight.item())

    watch = Watch()
    assert callbacks.training_step(loss, optimizer, watch=watch).item() == 4.5
    assert seen == [3.0, 3.5] and weight.weight.grad is None
    assert watch == pytest.approx([3.0, 3.5, 3.5, 3.0 - 0.35])


def test_micro_batches_of_sam_add_up():
    """Two halves with perturbations of their own, as `SAM.accumulate` has it."""
    halves = TOKENS[:1], TOKENS[1:2]
    model, other = gpt2(), gpt2()
    optimizer, callbacks = Regularization(optimizer="sgd", sam=0.5).apply(model, lr=0.1)
    for i, half in enumerate(halves):
        callbacks.gradients(lambda half=half: model(input_ids=half, labels=half).loss, accumulate=i == 0)
    optimizer.step()
    reference = fastreg.SAM(other.parameters(), fastreg.SGD, rho=0.5, lr=0.1)
    for half in halves:
        other(input_ids=half, labels=half).loss.backward()
        reference.first_step(zero_grad=True)
        other(input_ids=half, labels=half).loss.backward()
        reference.accumulate()
    reference.step()
    assert all(map(torch.equal, weights(model), weights(other)))


# Together -----------------------------------------------------------------------------------------------


def test_all_together_train_and_are_taken_away_again():
    model = gpt2(0.1)
    before = snapshot(model)
    recipe = Regularization.from_dict(FULL | {"weight_decay": 0.01, "l1": 1e-6, "token_noise": 0.01})
    optimizer, callbacks = recipe.apply(model, lr=0.1, steps=8, seed=3)
    assert [callback.name for callback in callbacks] == [
        "dropout", "embedding_noise", "activation_noise", "token_noise", "r_drop", "weight_noise",
        "adversarial", "sam",
    ]  # fmt: skip
    train(model, optimizer, callbacks, 8)
    model.eval()
    assert loss_of(model)().item() < loss_of(gpt2().eval())().item() - 0.1
    model.train()
    callbacks.remove()
    callbacks.remove()
    assert snapshot(model)[:2] == before[:2]


@pytest.mark.parametrize("recipe", [FULL, {"msam": 0.3, "ema": 0.9, "weight_noise": 0.01, "dropout": 0.3}])
def test_a_resumed_run_goes_on_bit_for_bit(recipe, tmp_path):
    recipe = Regularization.from_dict(recipe)

    def begun():
        model = gpt2(0.1)
        return model, *recipe.apply(model, lr=0.01, steps=6, seed=3)

    model, optimizer, callbacks = begun()
    train(model, optimizer, callbacks, 3)
    parts = (model, optimizer, callbacks)
    torch.save([part.state_dict() for part in parts], tmp_path / "x.pt")
    random = torch.get_rng_state()
    expected = train(model, optimizer, callbacks, 3)
    again = begun()
    for part, state in zip(again, torch.load(tmp_path / "x.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(random)
    assert train(*again, 3) == expected
    assert all(map(torch.equal, weights(model), weights(again[0])))


def test_the_seed_decides():
    recipe = Regularization(gradient_noise=0.1, weight_noise=0.1)
    found = []
    for seed in (1, 1, 2):
        model = gpt2()
        optimizer, callbacks = recipe.apply(model, lr=0.01, seed=seed)
        train(model, optimizer, callbacks, 2)
        found.append(weights(model))
    assert all(map(torch.equal, found[0], found[1])) and not all(map(torch.equal, found[0], found[2]))


SHARE = "is 1 of the run: give apply() the number of its steps="
REFUSED = [
    ({"dropout": {"annealing": {"start": 0.1}}}, {}, ValueError, f"dropout.annealing.steps {SHARE}"),
    ({"swa": 0.5}, {}, ValueError, "swa.start is 0.5 of the run: give apply() the number of its steps="),
    ({"weight_noise": {"annealing": "cosine"}}, {}, ValueError, f"weight_noise.annealing.steps {SHARE}"),
    ({"ema": [{"start": 0.5}]}, {}, ValueError, "ema[0].start is 0.5 of the run"),
    ({"lr_decay": 0.9}, {"lr": None}, ValueError, "lr_decay needs the learning rate"),
    ({"clip": 1}, {"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ({"clip": 1}, {"steps": 0}, ValueError, "steps must be a whole number >= 1, got steps=0"),
    ({"dropout": {"rate": 0.1, "roles": ["hidden", "path"]}}, {}, ValueError, "has no 'path' dropout"),
    ({"dropout": [{"rate": 0.1}, {"roles": "adapter"}]}, {}, ValueError, "has no 'adapter' dropout"),
    ({"dropout": {"layers": [0.1]}}, {}, ValueError, "dropout: got 1 rates for 2 layers"),
    ({"dropout": {"layers": "linear", "increase": 0.95}}, {}, ValueError, "rates must be in [0, 1]"),
    (
        {"dropout": 0.1, "embedding_noise": 5, "activation_noise": {"pattern": "nothing"}},
        {}, ValueError, "matches no module",
    ),
    (
        {"dropout": 0.1, "token_noise": 0.1, "r_drop": 1, "adversarial": {"modules": "nothing"}},
        {}, ValueError, "adversarial: no parameter has 'nothing' in its name",
    ),
    ({"dropout": 0.1, "token_noise": {"special_tokens": [99]}}, {}, ValueError, "token_noise: "),
]  # fmt: skip


@pytest.mark.parametrize("recipe, arguments, error, said", REFUSED, ids=lambda value: str(value)[:50])
def test_what_a_model_or_run_has_no_place_for_leaves_it_as_it_was(recipe, arguments, error, said):
    model = gpt2(0.1)
    before = snapshot(model)
    with pytest.raises(error, match=re.escape(said)):
        Regularization.from_dict(recipe).apply(model, **{"lr": 0.01} | arguments)
    assert snapshot(model) == before


def test_rates_that_were_set_before_come_back():
    model = gpt2(0.1)
    fastreg.layerwise.set_dropout(model, [0.2, 0.3])
    _, callbacks = Regularization(dropout=[{"rate": 0.5}, {"rate": 0.4, "roles": "embedding"}]).apply(model)
    assert model.transformer.h[0].mlp.dropout.p == 0.5
    callbacks.remove()
    assert [block.mlp.dropout.p for block in model.transformer.h] == [0.2, 0.3]
    assert model.transformer.drop.p == 0.1
    fastreg.layerwise.remove(model)
    assert model.transformer.h[0].mlp.dropout.p == 0.1
    injected = llama()
    fastreg.layerwise.set_dropout(injected, 0.2, inject=True)
    _, callbacks = Regularization(dropout=0.5).apply(injected)
    callbacks.remove()
    assert injected.model.layers[0].mlp.fastreg_dropout.p == 0.2


def test_a_step_without_the_passes_it_needs_is_noticed():
    for recipe in ({"adversarial": True}, {"weight_noise": 0.1}, {"r_drop": 1.0}):
        model = gpt2()
        optimizer, callbacks = Regularization.from_dict(recipe).apply(model, lr=0.1)
        callbacks.step(0)
        callbacks.training_step(loss_of(model), optimizer)
        callbacks.step(1)
        loss_of(model)().backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="needs passes of its own"):
            callbacks.step(2)


def test_state_of_other_callbacks_is_refused():
    _, callbacks = Regularization(embedding_noise=5).apply(gpt2())
    with pytest.raises(ValueError, match="the state is of the callbacks dropout; these are embedding_noise"):
        callbacks.load_state_dict({"dropout": {}})
    assert isinstance(callbacks, Callbacks) and isinstance(callbacks, list)


def test_apply_takes_a_model():
    with pytest.raises(TypeError, match="apply\\(\\) takes a model, got list"):
        Regularization().apply([torch.nn.Parameter(torch.ones(1))])


def test_a_backward_of_ones_own_is_called():
    model = gpt2()
    _, callbacks = Regularization(adversarial=True).apply(model)
    scaled = []

    def backward(loss):
        scaled.append(loss.item())
        (loss * 2).backward()

    value = callbacks.gradients(loss_of(model), backward=backward)
    assert len(scaled) == 2 and value.item() == scaled[0]


# The template -------------------------------------------------------------------------------------------


def test_the_template_is_a_recipe_and_every_section_of_it_is_one():
    from fastreg.cli.recipe import template

    printed = template()
    optimizer, callbacks = Regularization.from_dict(yaml.safe_load(printed)).apply(gpt2(), lr=0.1)
    assert [callback.name for callback in callbacks] == ["dropout"]
    for name, section in SECTIONS.items():
        assert f"\n{name}:" in printed or f"\n# {name}:" in printed
        start = re.search(rf"^(# )?{name}:$", printed, re.MULTILINE).start()
        lines = until_blank(printed[start:])
        assert len(lines) == 1 + len(section.keys)
        for line in lines[1:]:
            one = "\n".join((lines[0].removeprefix("# "), line.removeprefix("# ")))
            (key,) = yaml.safe_load(one)[name]
            read = section.read(name, yaml.safe_load(one)[name])
            assert key in section.keys and read is not None


def until_blank(text):
    lines = text.splitlines()
    return lines[: lines.index("")] if "" in lines else lines
