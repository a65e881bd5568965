"""Parameter groups: what decays, how fast each layer learns, and nothing is left out."""

import math

import pytest
import torch
import transformers as hf
from torch import nn

import fastreg
from fastreg.optim.groups import depths

CONFIG = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
MODELS = {
    "GPT-2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0)
    ),
    "Llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**CONFIG, num_hidden_layers=3, num_key_value_heads=2, bos_token_id=0, eos_token_id=0)
    ),
    "BERT": lambda: hf.BertForSequenceClassification(hf.BertConfig(**CONFIG, num_hidden_layers=3)),
    "T5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            num_layers=3, num_decoder_layers=2, d_model=32, d_ff=64, num_heads=2, d_kv=16, vocab_size=64
        )
    ),
}
LAYERED = {"lr": 1e-3, "lr_decay": 0.5}


def rates(model, key, **options):
    groups = fastreg.param_groups(model, **options)
    by_id = {id(p): group[key] for group in groups for p in group["params"]}
    return {name: by_id[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", ({}, LAYERED, {"weight_decay": lambda depth: depth}))
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_once_and_no_decay_where_none_belongs(name, options):
    model = MODELS[name]()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 > 0)
    groups = fastreg.param_groups(model, **options)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(map(id, model.parameters())) and len(set(listed)) == len(listed)
    decays = rates(model, "weight_decay", **{"weight_decay": 0.1, **options})
    for parameter, rate in decays.items():
        exempt = model.get_parameter(parameter).dim() < 2 or "norm" in parameter or "ln_" in parameter
        assert (
            rate == 0
            if exempt
            else rate > 0 or parameter.startswith(("transformer.w", "model.emb", "shared", "bert.emb"))
        )
    assert len({group["name"] for group in groups}) == len(groups)


def test_norms_with_matrices_do_not_decay():
    class MyRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

    model = nn.ModuleDict({"norm": MyRMSNorm(), "linear": nn.Linear(2, 2)})
    by_name = rates(model, "weight_decay", weight_decay=0.3)
    assert by_name == {"norm.weight": 0.0, "linear.weight": 0.3, "linear.bias": 0.0}


def test_layerwise_learning_rates():
    """lr · lr_decay^(L + 1 - depth), embeddings at depth 0 and the final norm at L + 1."""
    by_name = rates(MODELS["GPT-2"](), "lr", **LAYERED)
    assert by_name["transformer.wte.weight"] == by_name["transformer.wpe.weight"] == 1e-3 * 0.5**4
    for block in range(3):
        block_rates = {rate for name, rate in by_name.items() if name.startswith(f"transformer.h.{block}.")}
        assert block_rates == {1e-3 * 0.5 ** (3 - block)}
    assert by_name["transformer.ln_f.weight"] == 1e-3
    by_name = rates(MODELS["Llama"](), "lr", **LAYERED)
    assert by_name["model.embed_tokens.weight"] == 1e-3 / 16 and by_name["lm_head.weight"] == 1e-3
    by_name = rates(MODELS["BERT"](), "lr", **LAYERED)
    assert by_name["bert.pooler.dense.weight"] == by_name["classifier.bias"] == 1e-3


def test_encoder_and_decoder_have_depths_of_their_own():
    by_name, last = depths(MODELS["T5"]())
    assert last == 4 and by_name["shared.weight"] == 0
    assert by_name["encoder.block.0.layer.0.SelfAttention.q.weight"] == 1
    assert by_name["decoder.block.1.layer.0.SelfAttention.q.weight"] == 2
    assert by_name["encoder.final_layer_norm.weight"] == by_name["decoder.final_layer_norm.weight"] == 4
    config = hf.WhisperConfig(
        encoder_layers=2, decoder_layers=2, d_model=16, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=64, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    by_name, _ = depths(hf.WhisperForConditionalGeneration(config))
    assert by_name["model.encoder.conv1.weight"] == by_name["model.decoder.embed_tokens.weight"] == 0
    assert by_name["model.encoder.layer_norm.weight"] == 3


def test_decay_as_a_schedule_over_layers():
    by_name = rates(MODELS["GPT-2"](), "weight_decay", weight_decay=lambda depth: 0.1 * depth)
    assert by_name["transformer.wte.weight"] == 0
    assert [by_name[f"transformer.h.{i}.mlp.c_fc.weight"] for i in range(3)] == pytest.approx(
        [0.025, 0.05, 0.075]
    )


def test_tied_weights_count_once_where_they_are_first():
    model = MODELS["GPT-2"]()
    assert model.lm_head.weight is model.transformer.wte.weight
    groups = fastreg.param_groups(model, **LAYERED)
    (group,) = (g for g in groups if any(p is model.lm_head.weight for p in g["params"]))
    assert group["name"] == "before the blocks"


@pytest.mark.parametrize("make", (fastreg.AdamW, torch.optim.AdamW))
def test_optimizers_take_them(make):
    model = MODELS["GPT-2"]()
    for p in model.transformer.h[0].parameters():
        p.requires_grad_(False)
    optimizer = make(fastreg.param_groups(model, 0.1, **LAYERED))
    before = [p.detach().clone() for p in model.parameters()]
    for frozen in (True, False):
        for p in model.transformer.h[0].parameters():
            p.requires_grad_(not frozen)
        optimizer.zero_grad()
        model(input_ids=torch.arange(8).view(1, 8), labels=torch.arange(8).view(1, 8)).loss.backward()
        optimizer.step()
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        inside = [name.startswith("transformer.h.0.") for name, _ in model.named_parameters()]
        assert any(m for m, i in zip(moved, inside, strict=True) if i) == (not frozen)
        assert all(m for m, i in zip(moved, inside, strict=True) if not i)


def test_learning_rate_without_decay_goes_everywhere():
    assert set(rates(MODELS["GPT-2"](), "lr", lr=0.3).values()) == {0.3}
    assert all("lr" not in group for group in fastreg.param_groups(MODELS["GPT-2"]()))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be finite and >= 0, got -0.1"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay must be finite and >= 0, got nan"),
        ({"weight_decay": lambda depth: 0.5 - depth}, ValueError, "got -0.25 at depth 0.75"),
        ({"lr_decay": 0.5}, ValueError, r"lr_decay needs the learning rate .* got lr=None"),
        ({"lr": 1.0, "lr_decay": 0.0}, ValueError, r"lr_decay must be in \(0, 1\], got lr_decay=0.0"),
        ({"lr": 1.0, "lr_decay": 1.1}, ValueError, "got lr_decay=1.1"),
        ({"lr": -1.0}, ValueError, "lr must be finite and >= 0, got lr=-1.0"),
        ({"lr": math.nan}, ValueError, "got lr=nan"),
    ),
)
def test_wrong_values(options, error, message):
    with pytest.raises(error, match=message):
        fastreg.param_groups(MODELS["GPT-2"](), **options)


def test_wrong_models():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="takes a model, not its parameters, got generator"):
        fastreg.param_groups(model.parameters())
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        fastreg.param_groups(nn.ReLU())
    with pytest.raises(ValueError, match="found no repeated layers in Linear: give weight_decay as a number"):
        fastreg.param_groups(model, **LAYERED)
    assert len(fastreg.param_groups(model)) == 2
