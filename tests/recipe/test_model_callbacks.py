"""What a recipe does to a model and its passes."""

import pytest
import torch

import fastreg
from fastreg import Regularization


def test_dropout_by_layer_role_and_step(tools):
    model = tools.gpt2()
    recipe = Regularization(
        dropout=[
            {"layers": "linear", "base": 0.2, "increase": 0.2, "annealing": {"start": 1.0, "steps": 0.5}},
            {"roles": "embedding", "rate": 0.3},
        ]
    )  # fmt: skip
    _, callbacks = recipe.apply(model, lr=0.1, steps=8)
    rates = []
    for _ in range(5):
        rates.append([block.mlp.dropout.p for block in model.transformer.h])
        callbacks.step()
    expected = [[0.2 * share, 0.4 * share] for share in (1, 0.75, 0.5, 0.25, 0)]
    assert rates == [pytest.approx(each) for each in expected]
    assert model.transformer.drop.p == 0.3
    _, other = recipe.apply(model, lr=0.1, steps=8)
    other.load_state_dict({"dropout": {"last_step": [2]}})
    assert model.transformer.h[1].mlp.dropout.p == pytest.approx(0.2)


@pytest.mark.parametrize("schedule, expected", [("early", [0.3, 0.3, 0.0]), ("late", [0.0, 0.0, 0.3])])
def test_early_and_late_dropout(schedule, expected, tools):
    model = tools.gpt2()
    times = {"schedule": schedule, "start": 0.3, "steps": 2}
    _, callbacks = Regularization(dropout={"annealing": times}).apply(model, lr=0.1)
    rates = []
    for _ in range(3):
        rates.append(model.transformer.h[0].mlp.dropout.p)
        callbacks.step()
    assert rates == expected


def test_annealing_alone_multiplies_the_default_rate(tools):
    model = tools.gpt2()
    _, callbacks = Regularization(dropout={"annealing": {"steps": 2}}).apply(model, lr=0.1)
    rates = []
    for _ in range(3):
        rates.append(model.transformer.h[0].mlp.dropout.p)
        callbacks.step()
    assert rates == pytest.approx([0.1, 0.05, 0.0])


def test_dropout_is_injected_where_there_is_none(tools):
    model = tools.llama()
    with pytest.raises(ValueError, match="dropout: LlamaForCausalLM has no 'hidden' dropout.*inject=True"):
        Regularization(dropout=0.1).apply(model)
    _, callbacks = Regularization(dropout={"rate": 0.1, "inject": True}).apply(model)
    assert model.model.layers[1].mlp.fastreg_dropout.p == 0.1
    callbacks.remove()
    assert not hasattr(model.model.layers[1].mlp, "fastreg_dropout")


def test_rates_that_were_set_before_come_back(tools):
    model = tools.gpt2(0.1)
    fastreg.layerwise.set_dropout(model, [0.2, 0.3])
    _, callbacks = Regularization(dropout=[{"rate": 0.5}, {"rate": 0.4, "roles": "embedding"}]).apply(model)
    assert model.transformer.h[0].mlp.dropout.p == 0.5
    callbacks.remove()
    assert [block.mlp.dropout.p for block in model.transformer.h] == [0.2, 0.3]
    assert model.transformer.drop.p == 0.1
    fastreg.layerwise.remove(model)
    assert model.transformer.h[0].mlp.dropout.p == 0.1
    injected = tools.llama()
    fastreg.layerwise.set_dropout(injected, 0.2, inject=True)
    _, callbacks = Regularization(dropout=0.5).apply(injected)
    callbacks.remove()
    assert injected.model.layers[0].mlp.fastreg_dropout.p == 0.2


def test_noise_is_annealed(tools):
    model = tools.gpt2()
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
            by_name["activation_noise"]._attached.std, by_name["weight_noise"]._attached.std,
        )  # fmt: skip

    assert levels() == (4, 0.5, 0.2, 0.2)
    tools.train(model, optimizer, callbacks, 1)
    assert levels() == pytest.approx((2, 0.25, 0.1, 0.1))
    clean = tools.loss_of(tools.gpt2())().item()
    tools.train(model, optimizer, callbacks, 1)
    assert levels() == (0, 0, 0, 0)
    assert tools.train(model, optimizer, callbacks, 1) == [clean]


def test_token_noise_leaves_labels_and_special_tokens(tools):
    model = tools.gpt2()
    seen = []
    model.transformer.wte.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    _, callbacks = Regularization(token_noise={"rate": 1.0, "special_tokens": list(range(14))}).apply(model)
    tools.loss_of(model)()
    assert torch.equal(seen[-1][tools.TOKENS < 14], tools.TOKENS[tools.TOKENS < 14])
    assert set(seen[-1][tools.TOKENS >= 14].tolist()) <= {14, 15}
    everything, _ = Regularization(token_noise=1.0).apply(tools.gpt2())
    model.eval()
    tools.loss_of(model)()
    assert torch.equal(seen[-1], tools.TOKENS), "none while evaluating"
    callbacks.remove()
    model.train()
    tools.loss_of(model)()
    assert torch.equal(seen[-1], tools.TOKENS)


def test_activation_noise_goes_where_the_pattern_says(tools):
    model = tools.gpt2()
    _, callbacks = Regularization(activation_noise=0.1).apply(model)
    names = callbacks[0]._attached.names
    assert names == (
        "transformer.h.0.attn",
        "transformer.h.0.mlp",
        "transformer.h.1.attn",
        "transformer.h.1.mlp",
    )
    _, callbacks = Regularization(activation_noise={"std": 0.1, "pattern": "*.h.*.ln_?"}).apply(tools.gpt2())
    assert len(callbacks[0]._attached.names) == 4
    with pytest.raises(ValueError, match="activation_noise: '\\*.nothing' matches no module"):
        Regularization(activation_noise={"pattern": "*.nothing"}).apply(tools.gpt2())
    with pytest.raises(
        ValueError, match="activation_noise: found no attention or MLP in repeated layers of Linear"
    ):
        Regularization(activation_noise=True).apply(torch.nn.Linear(2, 2))


def test_r_drop_is_that_of_two_passes(tools):
    model = tools.gpt2(0.3)
    optimizer, callbacks = Regularization(optimizer="sgd", r_drop=2.0).apply(model, lr=0.0)
    torch.manual_seed(5)
    value = callbacks.gradients(tools.loss_of(model))
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(5)
    logits, logits2 = (model(input_ids=tools.TOKENS).logits[:, :-1] for _ in range(2))
    expected = fastreg.r_drop_loss(logits, logits2, tools.TOKENS[:, 1:], alpha=2.0)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-7)


def test_r_drop_over_micro_batches_counts_items_once(tools):
    """As the Trainer does it: every loss is a share of the items in all micro-batches."""
    model = tools.gpt2(0.3)
    _, callbacks = Regularization(r_drop=2.0).apply(model)
    labels = tools.TOKENS.clone()
    labels[0, 5:] = -100
    arguments = {"input_ids": tools.TOKENS, "labels": labels, "num_items_in_batch": 60}
    torch.manual_seed(5)
    value = callbacks.gradients(lambda: model(**arguments).loss)
    torch.manual_seed(5)
    logits, logits2 = (model(input_ids=tools.TOKENS).logits[:, :-1] for _ in range(2))
    expected = fastreg.r_drop_loss(logits, logits2, labels[:, 1:], alpha=2.0, reduction="sum") / 60
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(RuntimeError, match="one call of the model in each evaluation of the loss, got 4"):
        callbacks.gradients(lambda: model(**arguments).loss + model(**arguments).loss)


def test_r_drop_without_noise_is_noticed_once(tools):
    model = tools.gpt2()
    _, callbacks = Regularization(r_drop=1.0).apply(model)
    with pytest.warns(UserWarning, match="r_drop: both passes over the first batch gave the same logits"):
        callbacks.gradients(tools.loss_of(model))
    callbacks.gradients(tools.loss_of(model))  # warnings are errors here


def test_adversarial_gradients_are_added(tools):
    model = tools.gpt2()
    _, callbacks = Regularization(optimizer="sgd", adversarial={"epsilon": 0.5}).apply(model, lr=0.0)
    before = tools.weights(model)
    callbacks.gradients(tools.loss_of(model))
    gradients = [p.grad.clone() for p in model.parameters()]
    assert all(map(torch.equal, before, tools.weights(model)))
    model.zero_grad()
    embedding = model.transformer.wte.weight
    tools.loss_of(model)().backward()
    clean = [p.grad.clone() for p in model.parameters()]
    with torch.no_grad():
        embedding += 0.5 * embedding.grad / embedding.grad.norm()
    model.zero_grad()
    tools.loss_of(model)().backward()
    for a, b, p in zip(gradients, clean, model.parameters(), strict=True):
        torch.testing.assert_close(a, b + p.grad, rtol=1e-4, atol=1e-6)
