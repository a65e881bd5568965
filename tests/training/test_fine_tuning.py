"""Fine-tuning with dropout and learning rates that change from layer to layer and over time."""

import pytest

import fastreg
from fastreg.loops import (
    fine_tune_with_adaptive_regularization,
)

quiet = {"progress": False}


def test_dropout_falls_from_layer_to_layer_and_over_time(gpt2, language):
    net, rates = gpt2(), []

    def look(history):
        rates.append([block.mlp.dropout.p for block in net.transformer.h])

    before = [block.mlp.dropout.p for block in net.transformer.h]
    history = fine_tune_with_adaptive_regularization(
        net, language(4), lr=1e-3, dropout=(0.1, 0.3), epochs=1, callback=look, **quiet
    )
    for step, actual in enumerate(rates, 1):
        assert actual == pytest.approx([rate * (1 - step / 4) for rate in (0.1, 0.2, 0.3)], abs=1e-6)
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


def test_learning_rates_fall_by_default(gpt2, language):
    history = fine_tune_with_adaptive_regularization(gpt2(), language(3), lr=1e-3, epochs=3, **quiet)
    assert history.lr == pytest.approx([1e-3 * min(1, (t + 1) / 2) * (1 - t / 9) for t in range(9)])
    steady = fine_tune_with_adaptive_regularization(gpt2(), language(2), lr=1e-3, warmup=0, epochs=1, **quiet)
    assert steady.lr == [1e-3, 1e-3]


def test_fine_tuning_goes_on_with_a_history(gpt2, language):
    """Rates fall over both trainings together, from where the first has come to."""
    net, options = gpt2(), {"lr": 1e-3, "dropout": (0.3, 0.3), "epochs": None, **quiet}
    history = fine_tune_with_adaptive_regularization(net, language(3), max_steps=3, **options)
    seen = []
    net.register_forward_pre_hook(lambda *_: seen.append(net.transformer.h[0].mlp.dropout.p))
    fine_tune_with_adaptive_regularization(net, language(3), max_steps=3, history=history, **options)
    assert history.steps == 6 and seen[-3:] == pytest.approx([0.15, 0.1, 0.05], abs=1e-6)
    assert history.lr[3:] == pytest.approx([0.5e-3, 1e-3 / 3, 1e-3 / 6])


def test_what_a_checkpoint_says_of_its_rates_stays(tmp_path, gpt2, language):
    net = gpt2()
    fastreg.layerwise.set_dropout(net, 0.2)
    net.save_pretrained(tmp_path)
    net = type(net).from_pretrained(tmp_path)
    said = net.config.to_dict()["fastreg"]
    fine_tune_with_adaptive_regularization(net, language(1), epochs=1, **quiet)
    assert net.config.to_dict()["fastreg"] == said


def test_a_model_by_its_name(tmp_path, gpt2, language):
    gpt2().save_pretrained(tmp_path)
    history = fine_tune_with_adaptive_regularization(str(tmp_path), language(2), epochs=1, **quiet)
    assert type(history.model).__name__ == "GPT2LMHeadModel" and history.steps == 2
    with pytest.raises(ValueError, match="AutoModelForNothing"):
        fine_tune_with_adaptive_regularization(
            str(tmp_path), language(2), auto_class="AutoModelForNothing", **quiet
        )


def test_what_fine_tuning_refuses(loader, mlp, gpt2, language):
    with pytest.raises(ValueError, match="repeated layers|dropout"):
        fine_tune_with_adaptive_regularization(mlp(), loader(), **quiet)
    with pytest.raises(ValueError, match="no length"):
        fine_tune_with_adaptive_regularization(gpt2(), iter(language(2)), **quiet)
    net = gpt2()
    with pytest.raises(ValueError, match=r"dropout must be two rates, .* such as \(0.05, 0.15\), got 0.1"):
        fine_tune_with_adaptive_regularization(net, language(2), dropout=0.1, **quiet)
    fastreg.layerwise.set_dropout(net, 0.2)
    with pytest.raises(ValueError, match="set by fastreg.layerwise"):
        fine_tune_with_adaptive_regularization(net, language(2), **quiet)
    assert net.transformer.h[0].mlp.dropout.p == pytest.approx(0.2, abs=1e-5)
