"""Other Trainers and models."""

from typing import Any

import pytest
import torch
import transformers as hf

import fastreg
from fastreg.hf import FastregTrainer, FastregTrainerMixin

RECIPE: dict[str, Any] = {
    "sam": 0.1, "ema": 0.8, "clip": 1.0, "weight_decay": 0.01, "lr_decay": 0.9, "optimizer": {"eps": 1e-5},
    "dropout": {"rate": 0.1, "annealing": "linear"},
}  # fmt: skip
SMALL = {"vocab_size": 24, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


class Seq2Seq(FastregTrainerMixin, hf.Seq2SeqTrainer):
    pass


def test_sequence_to_sequence(runs, tools) -> None:
    torch.manual_seed(0)
    config = hf.BartConfig(
        **SMALL, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
        decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    model = hf.BartForConditionalGeneration(config)
    arguments = {"cls": hf.Seq2SeqTrainingArguments, "max_steps": 20, "gradient_accumulation_steps": 2}
    trainer = runs.train(
        Seq2Seq, model=model, recipe=RECIPE,
        arguments={**arguments, "predict_with_generate": True, "generation_max_length": 4},
    )  # fmt: skip
    losses = tools.logged(trainer, "loss")
    assert losses[-1] < 0.9 * losses[0]
    assert trainer.predict(runs.data[:8]).predictions.shape[0] == 8


@pytest.mark.slow
def test_classification(runs, tools) -> None:
    torch.manual_seed(0)
    config = hf.BertConfig(
        **SMALL, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2,
        max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    model = hf.BertForSequenceClassification(config)
    labels = [i % 3 == 0 for i in range(32)]
    runs.data = [{"input_ids": torch.full((10,), 3 + 9 * label), "labels": int(label)} for label in labels]
    arguments = {"max_steps": 30, "eval_strategy": "steps", "eval_steps": 15}
    trainer = runs.train(model=model, recipe=RECIPE, arguments=arguments)
    losses = tools.logged(trainer, "loss")
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    first, second = tools.logged(trainer, "eval_loss")
    assert second < first


QUIET = {"sam": 0.3, "ema": 0.5, "clip": 0.5, "weight_decay": 0.1, "optimizer": {"eps": 1e-5}}


def test_on_every_backend(runs, tools, backend) -> None:
    with fastreg.use_backend("reference"):
        expected = runs.train(recipe=QUIET, arguments={"max_steps": 2})
    trainer = runs.train(recipe=QUIET, arguments={"max_steps": 2})
    assert tools.distance(tools.weights(trainer.model), tools.weights(expected.model)) < 1e-5


@pytest.mark.slow
def test_a_compiled_model(runs, tools) -> None:
    recipe = {**QUIET, "embedding_noise": 1.0, "dropout": {"rate": 0.3, "annealing": "linear"}}
    arguments = {"max_steps": 3, "torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer = runs.train(recipe=QUIET, dropout=0.0, arguments=arguments)
    plain = runs.train(recipe=QUIET, dropout=0.0, arguments={"max_steps": 3})
    assert tools.distance(tools.weights(trainer.model), tools.weights(plain.model)) < 1e-5
    other = runs.train(recipe=recipe, arguments=arguments)
    assert all(bool(w.isfinite().all()) for w in tools.weights(other.model).values())


def test_label_smoothing(runs, tools) -> None:
    arguments = {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}
    plain = runs.train(hf.Trainer, arguments=arguments, dropout=0.0, **tools.torch_adamw())
    ours = runs.train(arguments=arguments, dropout=0.0, **tools.sam(rho=0.0))
    assert tools.distance(tools.weights(ours.model), tools.weights(plain.model)) < 1e-5


def test_a_model_that_is_made_anew_by_each_run(runs, tools) -> None:
    options = {"recipe": RECIPE, "train_dataset": runs.data, "model_init": lambda: tools.tiny()}
    trainer = FastregTrainer(args=runs.arguments(max_steps=3), **options)
    trainer.remove_callback(hf.PrinterCallback)
    trainer.train()
    first, model = tools.weights(trainer.model), trainer.model
    trainer.train()
    assert trainer.model is not model
    assert tools.distance(tools.weights(trainer.model), first) == 0


def test_activation_checkpointing(runs, tools) -> None:
    """Recomputed passes see the perturbed weights and the masks of theirs."""
    plain = runs.train(dropout=0.3, **tools.sam(rho=0.3))
    model = tools.tiny(0.3)
    # Its name is another since transformers 5.23, and the former one is deprecated.
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    recomputed = runs.train(model=model, **tools.sam(rho=0.3))
    assert tools.distance(tools.weights(recomputed.model), tools.weights(plain.model)) < 1e-5


@pytest.mark.parametrize("recipe", [{"lr_decay": 0.5, "sam": 0.1, "ema": 0.5, "embedding_noise": 1.0}])
def test_adapters_of_peft(runs, tools, recipe, monkeypatch) -> None:
    peft = pytest.importorskip("peft")
    if hasattr(hf.PreTrainedModel, "is_activation_checkpointing"):
        # peft asks for the former name, which is deprecated
        monkeypatch.setattr(hf.PreTrainedModel, "is_gradient_checkpointing", False)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tools.tiny(), config)
    before = tools.weights(model)
    arguments = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    trainer = runs.train(model=model, recipe=recipe, arguments=arguments)
    after = tools.weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("lora" in name for name in changed)
    model = peft.get_peft_model(tools.tiny(), config)
    model.load_state_dict(before, strict=False)  # tied ones are there once
    resumed = runs.train(
        model=model, recipe=recipe, arguments=arguments, resume=f"{trainer.args.output_dir}/checkpoint-3"
    )
    assert tools.distance(tools.weights(resumed.model), after) == 0
