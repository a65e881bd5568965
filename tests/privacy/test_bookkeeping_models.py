"""Clipped sums of real models: Hugging Face's, adapters, and Opacus where it can."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)  # fmt: skip

from fastreg.privacy.bookkeeping import BookKeeping

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated.*v6:FutureWarning"
)  # peft's calls, and of old names

VOCABULARY, LENGTH, SAMPLES = 60, 6, 3


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2, n_head=2, n_embd=16, vocab_size=VOCABULARY, n_positions=8, resid_pdrop=0.0,
            attn_pdrop=0.0, embd_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def decoder(config_class, model_class, **options):
    return model_class(
        config_class(
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, hidden_size=16,
            intermediate_size=24, vocab_size=VOCABULARY, max_position_embeddings=8, head_dim=8,
            pad_token_id=None, bos_token_id=0, eos_token_id=0, **options,
        )
    )  # fmt: skip


def bert():
    return BertForSequenceClassification(
        BertConfig(
            num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=24, pad_token_id=0,
            vocab_size=VOCABULARY, max_position_embeddings=8, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, num_labels=3,
        )
    )  # fmt: skip


def lora():
    return get_peft_model(
        gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    )


MODELS = {
    "gpt2": gpt2,  # tied, Conv1D, positions without samples
    "bert": bert,  # padding_idx, positions without samples
    "llama": lambda: decoder(LlamaConfig, LlamaForCausalLM, tie_word_embeddings=False),
    "gemma2": lambda: decoder(Gemma2Config, Gemma2ForCausalLM),  # 1 + weight, tied
    "lora": lora,
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().train()


def batch_of(model, samples=SAMPLES):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (samples, LENGTH), generator=generator)
    ids[:, 4] = ids[:, 1]  # some word twice
    labels = ids if model.config.model_type != "bert" else torch.randint(3, (samples,), generator=generator)
    return [ids, labels]


def loss_of(model, ids, labels):
    return model(input_ids=ids, labels=labels).loss


def test_hugging_face(model, OneByOne):
    batch = batch_of(model)
    whole = OneByOne(model, loss_of, batch, math.inf)
    bound = float(torch.stack(whole.norms).median())
    expected = OneByOne(model, loss_of, batch, bound)
    engine = BookKeeping(model, max_grad_norm=bound)
    loss_of(model, *batch).backward()
    expected.check(model, engine.norms)
    assert 0 < engine.clipped_samples < SAMPLES and engine.parameters.keys() == expected.sums.keys()


def test_hugging_face_with_checkpoints(OneByOne):
    torch.manual_seed(0)
    model = gpt2().train()
    batch = batch_of(model)
    expected = OneByOne(model, loss_of, batch, 0.5)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    engine = BookKeeping(model, max_grad_norm=0.5)
    loss_of(model, *batch).backward()
    expected.check(model, engine.norms)


def test_adapters_under_autocast():
    """What is trained is in float32, whatever activations are in."""
    torch.manual_seed(0)
    model = lora()
    batch = batch_of(model)
    BookKeeping(model, max_grad_norm=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, *batch)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in trained)
    assert torch.stack([p.grad.double().norm() for p in trained]).norm() <= SAMPLES * 0.5


class Words(nn.Module):
    """What Opacus can do, too: no tied weights, positions with samples."""

    def __init__(self):
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, 16), nn.Embedding(8, 16)
        self.norm, self.up, self.head = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(48, VOCABULARY)

    def forward(self, ids):
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        return self.head(F.gelu(self.up(self.norm(self.words(ids) + self.positions(positions)))))


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, groups=2)
        self.norm, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm(F.relu(self.first(x))))
        return self.head(self.second(x).mean((2, 3)))


def mean_loss(model, x, labels):
    return F.cross_entropy(model(x).flatten(0, -2), labels.flatten())


@pytest.mark.filterwarnings("ignore")  # Opacus', about its own hooks
@pytest.mark.parametrize("make", [Words, Pixels, lora])
def test_flat_clipping_of_opacus(make):
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    torch.manual_seed(0)
    ours, samples = make(), 5
    if make is lora:
        for name, p in ours.named_parameters():
            p.requires_grad_("lora_B" in name or "lora_A" in name)
    theirs = make()
    theirs.load_state_dict(ours.state_dict())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        q.requires_grad_(p.requires_grad)
    generator = torch.Generator().manual_seed(1)
    if make is Pixels:
        batch = [torch.randn(samples, 3, 9, 9, generator=generator), torch.arange(samples)]
        loss = mean_loss
    else:
        ids = torch.randint(VOCABULARY, (samples, LENGTH), generator=generator)
        batch, loss = [ids, ids.roll(1, 1)], loss_of if make is lora else mean_loss
    wrapped = GradSampleModule(theirs)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = DPOptimizer(
        torch.optim.SGD(trained, lr=0.1), noise_multiplier=0.0, max_grad_norm=0.1, expected_batch_size=samples
    )
    loss(wrapped, *batch).backward()
    optimizer.clip_and_accumulate()
    engine = BookKeeping(ours, max_grad_norm=0.1)
    loss(ours, *batch).backward()
    assert engine.clipped_samples == samples
    for p, q in zip((p for p in ours.parameters() if p.requires_grad), trained, strict=True):
        expected = q.summed_grad.view_as(q)
        assert (p.grad - expected).abs().amax() <= 1e-5 * expected.abs().amax()
