"""Blocks are found in any transformer, by their form alone."""

import pytest
import torch
import transformers as hf
from torch import nn

from fastreg.common.blocks import stacks

LAYER = nn.TransformerEncoderLayer(16, 2, 32)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
TEXT = {**SMALL, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
MODELS = {
    "GPT-2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0)
    ),
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=2)),
    "BERT": lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT)),
    "ViT": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=16, patch_size=8)),
    "T5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            num_layers=3, num_decoder_layers=2, d_model=32, d_ff=64, num_heads=2, d_kv=16, vocab_size=64
        )
    ),
    "Mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4)
    ),
    "Swin": lambda: hf.SwinForImageClassification(
        hf.SwinConfig(depths=[1, 2], num_heads=[2, 2], embed_dim=16, image_size=32, window_size=4)
    ),
    "ConvNeXt": lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(depths=[1, 2], hidden_sizes=[8, 16], num_stages=2)
    ),
    "Whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            encoder_layers=3, decoder_layers=2, d_model=16, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=64, pad_token_id=0,
            bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
        )
    ),
    "torch": lambda: nn.ModuleDict(
        {"embed": nn.Embedding(8, 16), "body": nn.TransformerEncoder(LAYER, 3)}
    ),
}  # fmt: skip
STACKS = {
    "GPT-2": [("transformer.h.0", "transformer.h.2", 3)],
    "Llama": [("model.layers.0", "model.layers.2", 3)],
    "BERT": [("bert.encoder.layer.0", "bert.encoder.layer.2", 3)],
    "ViT": [("layers.0", "layers.2", 3)],
    "T5": [("encoder.block.0", "encoder.block.2", 3), ("decoder.block.0", "decoder.block.1", 2)],
    "Mixtral": [("model.layers.0", "model.layers.2", 3)],
    "Swin": [("swin.encoder.layers.0.blocks.0", "swin.encoder.layers.1.blocks.1", 3)],
    "ConvNeXt": [("convnext.encoder.stages.0.layers.0", "convnext.encoder.stages.1.layers.1", 3)],
    "Whisper": [
        ("model.encoder.layers.0", "model.encoder.layers.2", 3),
        ("model.decoder.layers.0", "model.decoder.layers.1", 2),
    ],
    "torch": [("body.layers.0", "body.layers.2", 3)],
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_found(name):
    model = MODELS[name]()
    actual = stacks(model)
    for stack, (first, last, count) in zip(actual, STACKS[name], strict=True):
        assert stack[0][0].endswith(first) and stack[-1][0].endswith(last) and len(stack) == count
        assert all(model.get_submodule(path) is block for path, block in stack)


@pytest.mark.parametrize(
    "model",
    (
        nn.Linear(2, 2),
        nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)),
        nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.2)),
        nn.ModuleList(),
    ),
)
def test_nothing_is_repeated(model):
    assert stacks(model) == []


def test_small_lists_beside_a_stack_are_none():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
            self.layers = nn.ModuleList(nn.Linear(20, 20) for _ in range(4))

    ((first, *rest),) = stacks(Model())
    assert first[0] == "layers.0" and len(rest) == 3
    assert torch.is_tensor(first[1].weight)
