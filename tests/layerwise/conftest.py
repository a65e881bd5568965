"""Small models of many families, made once: tests take copies."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from torch import nn

from fastreg.layerwise.inputs import candidates

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3}
SPECIAL = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
TEXT = {**SMALL, **SPECIAL, "max_position_embeddings": 32}
GQA = {**TEXT, "num_key_value_heads": 1}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 8}
BART = {
    **SPECIAL, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32,
    "decoder_start_token_id": 1, "activation_dropout": 0.1,
}  # fmt: skip
WAVES = {
    **SMALL, "vocab_size": 16, "conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
}  # fmt: skip


class Family(NamedTuple):
    """How to make a model, and the sites it has."""

    model: str
    config: str
    options: dict[str, Any]
    layers: tuple[int, ...]
    """Blocks in each stack."""
    roles: str
    """First letters of the roles: hidden, attention, activation (x), embedding, head (o), path, layerdrop."""
    sdpa: bool = True


FAMILIES = {
    "albert": Family(
        "AlbertForSequenceClassification", "AlbertConfig", {**TEXT, "embedding_size": 16}, (1,), "haeo"
    ),
    "bart": Family("BartForConditionalGeneration", "BartConfig", BART, (3, 2), "haxel"),
    "bert": Family("BertForSequenceClassification", "BertConfig", TEXT, (3,), "haeo"),
    "clip": Family(
        "CLIPModel", "CLIPConfig",
        {"text_config": {**TEXT, "projection_dim": 16}, "vision_config": IMAGE, "projection_dim": 16},
        (3, 3), "a",
    ),
    "convnext": Family(
        "ConvNextForImageClassification", "ConvNextConfig",
        {"depths": [1, 2], "hidden_sizes": [8, 16], "num_stages": 2, "image_size": 16, "drop_path_rate": 0.1},
        (3,), "p", sdpa=False,
    ),
    "deberta": Family(
        "DebertaV2ForSequenceClassification", "DebertaV2Config",
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, (3,), "haeo", sdpa=False,
    ),
    "distilbert": Family(
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {"dim": 32, "hidden_dim": 48, "n_heads": 2, "n_layers": 3, **SPECIAL}, (3,), "haeo",
    ),
    "electra": Family(
        "ElectraForTokenClassification", "ElectraConfig", {**TEXT, "embedding_size": 16}, (3,), "haeo"
    ),
    "gemma": Family("GemmaForCausalLM", "GemmaConfig", {**GQA, "head_dim": 16}, (3,), "a"),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2Config", {**GQA, "head_dim": 16}, (3,), "a", sdpa=False),
    "gpt2": Family(
        "GPT2LMHeadModel", "GPT2Config",
        {"n_layer": 3, "n_embd": 32, "n_head": 2, "n_positions": 32, **SPECIAL}, (3,), "hae",
    ),
    "gptneox": Family(
        "GPTNeoXForCausalLM", "GPTNeoXConfig",
        {**TEXT, "hidden_dropout": 0.1, "attention_dropout": 0.1}, (3,), "hae",
    ),
    "llama": Family("LlamaForCausalLM", "LlamaConfig", GQA, (3,), "a"),
    "mistral": Family("MistralForCausalLM", "MistralConfig", GQA, (3,), "a"),
    "mixtral": Family("MixtralForCausalLM", "MixtralConfig", {**GQA, "num_local_experts": 2}, (3,), "a"),
    "opt": Family(
        "OPTForCausalLM", "OPTConfig",
        {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.1}, (3,), "hal",
    ),
    "phi": Family("PhiForCausalLM", "PhiConfig", TEXT, (3,), "hae"),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", GQA, (3,), "a"),
    "roberta": Family("RobertaForSequenceClassification", "RobertaConfig", TEXT, (3,), "haeo"),
    "swin": Family(
        "SwinForImageClassification", "SwinConfig",
        {"depths": [1, 2], "num_heads": [2, 2], "embed_dim": 16, "image_size": 32, "window_size": 4,
         "drop_path_rate": 0.1}, (3,), "haep",
    ),
    "t5": Family(
        "T5ForConditionalGeneration", "T5Config",
        {"d_model": 32, "d_ff": 48, "num_heads": 2, "d_kv": 16, "num_layers": 3, "num_decoder_layers": 2,
         **SPECIAL, "decoder_start_token_id": 2}, (3, 2), "haxe",
    ),
    "vit": Family("ViTForImageClassification", "ViTConfig", IMAGE, (3,), "hae"),
    "wav2vec2": Family("Wav2Vec2ForCTC", "Wav2Vec2Config", WAVES, (3,), "haxeol"),
    "whisper": Family(
        "WhisperForConditionalGeneration", "WhisperConfig",
        {**BART, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}, (3, 2), "haxel",
    ),
    "xlnet": Family(
        "XLNetLMHeadModel", "XLNetConfig",
        {"d_model": 32, "n_layer": 3, "n_head": 2, "d_inner": 48, **SPECIAL}, (3,), "he", sdpa=False,
    ),
}  # fmt: skip
LETTERS = {
    "h": "hidden", "a": "attention", "x": "activation", "e": "embedding", "o": "head", "p": "path",
    "l": "layerdrop",
}  # fmt: skip
REPEATED = {
    "distilbert",
    "electra",
    "gemma",
    "gemma2",
    "gptneox",
    "mistral",
    "phi",
    "qwen2",
    "roberta",
    "whisper",
}
"""Families whose blocks are like those of another: their tests are slow ones."""
DEFAULT = {name: "sdpa" if family.sdpa else "eager" for name, family in FAMILIES.items()}
CASES = [(n, k) for n, f in FAMILIES.items() for k in (("sdpa", "eager") if f.sdpa else ("eager",))]


@functools.cache
def _made(name: str, attention: str) -> nn.Module:
    family = FAMILIES[name]
    config = getattr(hf, family.config)(**family.options)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = getattr(hf, family.model)(config)
    with torch.no_grad():  # some parameters start as zeros, which would hide dropout
        for p in model.parameters():
            p.normal_(std=0.2).add_(0.05)
    return model.eval()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine, waiting threads take 9 ms where these sizes need 10 µs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run() -> Callable[..., list[torch.Tensor]]:
    """Returns all output tensors of a model for small inputs; masks depend only on the seed."""

    def run(model: Any, training: bool, seed: int = 0) -> list[torch.Tensor]:
        args, kwargs = next(candidates(model))
        torch.manual_seed(seed)
        with torch.no_grad():
            output = model.train(training)(*args, **kwargs)
        return [x for x in output.to_tuple() if isinstance(x, torch.Tensor) and x.is_floating_point()]

    return run


@pytest.fixture
def make() -> Callable[..., Any]:
    """A fresh copy of a small model."""
    return lambda name, attention=None: copy.deepcopy(_made(name, attention or DEFAULT[name]))


def marked(name: str, *values: str) -> Any:
    """A parameter of tests, slow for a family that repeats another."""
    return pytest.param(
        (name, *values), marks=[pytest.mark.slow] * (name in REPEATED), id="-".join((name, *values))
    )


@pytest.fixture(params=[marked(*case) for case in CASES])
def case(request: pytest.FixtureRequest) -> tuple[Family, Any]:
    """A family and a copy of its model, for each kind of attention."""
    return FAMILIES[request.param[0]], copy.deepcopy(_made(*request.param))


@pytest.fixture(params=[marked(name) for name in FAMILIES])
def family(request: pytest.FixtureRequest) -> tuple[Family, Any]:
    """A family and a copy of its model, with the attention that is its default."""
    (name,) = request.param
    return FAMILIES[name], copy.deepcopy(_made(name, DEFAULT[name]))
