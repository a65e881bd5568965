"""NEFTune: what transformers adds, bit for bit; what the paper adds; and to whom."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastreg.nn import EmbeddingNoise, NoiseScheduler, attach_embedding_noise
from fastreg.schedules import Linear

transformers = pytest.importorskip("transformers")
neftune = pytest.importorskip("transformers.integrations.neftune")

pytestmark = pytest.mark.usefixtures("reference")
LENGTHS = [3, 8, 1, 5]


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def batch():
    ids = torch.randint(1, 50, (4, 8), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(8) < torch.tensor(LENGTHS)[:, None]).long()
    return ids * mask, mask


def embeddings(model, *args, seed=3, **kwargs):
    """What comes out of the embedding in a forward pass."""
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    torch.manual_seed(seed)
    model(*args, **kwargs)
    handle.remove()
    return seen[0].detach()


def added(model, *args, **kwargs):
    ids = args[0] if args else kwargs["input_ids"]
    clean = model.get_input_embeddings().weight[ids].detach()
    return embeddings(model, *args, **kwargs) - clean


# As transformers does ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "alpha, dtype", [(5.0, torch.float32), (0.1, torch.float64), (5.0, torch.bfloat16), (15, torch.bfloat16)]
)
def test_padded_equals_the_trainers_hook(alpha, dtype):
    """The same bits under one seed, several times in a row, and the same gradients."""
    ids, mask = batch()

    def trained(attach):
        model = llama().to(dtype)
        handle = attach(model)
        torch.manual_seed(5)
        losses = []
        for _ in range(2):
            output = model(input_ids=ids, attention_mask=mask, labels=ids)
            output.loss.backward()
            losses.append(output.loss.detach())
        handle.remove()
        return [*losses, *(p.grad for p in model.parameters())]

    theirs = trained(lambda model: neftune.activate_neftune(model, alpha))
    ours = trained(lambda model: attach_embedding_noise(model, alpha))
    assert all(map(torch.equal, ours, theirs))
    without = trained(lambda model: attach_embedding_noise(model, 0.0))
    assert not torch.equal(without[0], ours[0])


def test_refuses_beside_the_trainers_hook():
    model = llama()
    neftune.activate_neftune(model, 5.0)
    with pytest.raises(RuntimeError, match="neftune_noise_alpha=5.0: leave it out of TrainingArguments"):
        attach_embedding_noise(model)
    model = llama()
    attach_embedding_noise(model)
    neftune.activate_neftune(model, 5.0)
    with pytest.raises(RuntimeError, match="leave it out of TrainingArguments"):
        model(input_ids=batch()[0])


# As the paper does ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("positional", [False, True])
def test_true_lengths(positional):
    """max ≤ α / √(len d) for each sample, its standard deviation that over √3, and padding is untouched."""
    ids, mask = batch()
    model = llama()
    attach_embedding_noise(model, 5.0, length="true")
    args, kwargs = ((ids, mask), {}) if positional else ((), {"input_ids": ids, "attention_mask": mask})
    noise = torch.stack([added(model, *args, **kwargs, seed=seed) for seed in range(50)])
    assert not noise[:, mask == 0].any()
    for sample, length in enumerate(LENGTHS):
        sample_noise = noise[:, sample, :length].double()
        limit = 5.0 / math.sqrt(length * 16)
        assert 0.98 * limit < sample_noise.abs().max() <= limit * (1 + 1e-5)
        ratio = sample_noise.square().mean() / (limit**2 / 3)
        assert abs(ratio - 1) < 5 * math.sqrt(4 / 5 / sample_noise.numel())


def test_without_a_mask_all_tokens_count():
    ids, _ = batch()
    true, padded = llama(), llama()
    attach_embedding_noise(true, 5.0, length="true")
    attach_embedding_noise(padded, 5.0, generator="counter")
    assert torch.equal(embeddings(true, input_ids=ids), embeddings(padded, input_ids=ids))


def test_a_mask_does_not_outlive_its_pass():
    ids, mask = batch()
    model = llama()
    attached = attach_embedding_noise(model, 5.0, length="true")
    model(input_ids=ids, attention_mask=mask)
    assert attached._mask is None
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(4, 8\).*got \(4, 7\)"):
        model(input_ids=ids, attention_mask=mask[:, 1:])
    assert attached._mask is None
    assert (added(model, input_ids=ids) != 0).all(-1).all()


# Either --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", ["torch", "counter"])
def test_padded_lengths(generator):
    x = torch.zeros(64, 128, 64)
    torch.manual_seed(0)
    noise = EmbeddingNoise(5.0, generator=generator)(x).double()
    limit = 5.0 / math.sqrt(128 * 64)
    assert 0.999 * limit < noise.abs().max() <= limit * (1 + 1e-6)
    assert abs(noise.mean()) < 5 * limit / math.sqrt(3 * noise.numel())
    assert abs(noise.square().mean() / (limit**2 / 3) - 1) < 5 * math.sqrt(4 / 5 / noise.numel())
    # ‖noise‖ of a sample is α / √3 on average.
    assert noise.flatten(1).norm(dim=1).mean() == pytest.approx(5 / math.sqrt(3), rel=2e-3)


@pytest.mark.parametrize("length", ["padded", "true"])
def test_gaussian_noise_of_a_std(length):
    ids, mask = batch()
    model = llama()
    attached = attach_embedding_noise(model, std=0.2, length=length)
    noise = torch.stack([added(model, input_ids=ids, attention_mask=mask, seed=seed) for seed in range(50)])
    unmasked = noise[:, mask == 1].double()
    assert abs(unmasked.square().mean() / 0.04 - 1) < 5 * math.sqrt(2 / unmasked.numel())
    assert bool(noise[:, mask == 0].any()) == (length == "padded")
    assert attached.alpha is None and attached.std == 0.2
    with pytest.raises(AttributeError, match="has a std, not an alpha"):
        attached.alpha = 1.0
    attached.std = 0.0
    assert not added(model, input_ids=ids, attention_mask=mask).any()


OPTIONS = [{}, {"generator": "counter"}, {"length": "true"}, {"std": 0.1}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_evaluation_and_gradients_are_untouched(options):
    ids, mask = batch()
    model = llama()
    clean = model.eval()(input_ids=ids, attention_mask=mask).logits
    with attach_embedding_noise(model, **options) as attached:
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, clean)
        embedding = model.get_input_embeddings().train()
        weight = torch.randn(4, 8, 16)
        output = model.train().get_input_embeddings()(ids)
        (gradient,) = torch.autograd.grad((output * weight).sum(), embedding.weight)
        expected = torch.zeros_like(embedding.weight).index_add_(0, ids.flatten(), weight.flatten(0, 1))
        expected[0] = 0  # of the padding token
        torch.testing.assert_close(gradient, expected)
        assert attached.alpha in (5.0, None)
    assert not embedding._forward_hooks and not model._forward_hooks and not model._forward_pre_hooks
    assert torch.equal(model.eval()(input_ids=ids, attention_mask=mask).logits, clean)
    attached.remove()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_checkpoints_draw_the_same_noise(options):
    ids, mask = batch()
    results = []
    for checkpointed in (False, True):
        model = llama()
        attach_embedding_noise(model, **options)

        def loss(mask, model=model):
            return model(input_ids=ids, attention_mask=mask).logits.square().sum()

        torch.manual_seed(1)
        value = checkpoint(loss, mask, use_reentrant=False) if checkpointed else loss(mask)
        value.backward()
        results.append([value.detach(), *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("options", [{}, {"length": "true"}], ids=str)  # each generator once
def test_compiles_once(options, counting):
    """With levels that change; counters draw the same as in eager mode."""
    graphs, compiler = counting
    ids, mask = batch()
    model = llama()
    clean = model(input_ids=ids, attention_mask=mask).logits
    attached = attach_embedding_noise(model, **options)
    scheduler = NoiseScheduler(attached, Linear(1.0, steps=3))
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for _ in range(3):
        torch.manual_seed(2)
        logits = compiled(input_ids=ids, attention_mask=mask).logits
        torch.manual_seed(2)
        eager = model(input_ids=ids, attention_mask=mask).logits
        if options:
            torch.testing.assert_close(logits, eager)
        assert not torch.allclose(logits, clean)
        scheduler.step()
    assert torch.allclose(compiled(input_ids=ids, attention_mask=mask).logits, clean)
    assert len(graphs) == 1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("positional", [False, True])
def test_wrapped_models_get_the_noise_of_plain_ones(wrap, options, positional):
    ids, mask = batch()

    def logits(model, run):
        with attach_embedding_noise(model, **options):
            torch.manual_seed(2)
            return (run(ids, mask) if positional else run(input_ids=ids, attention_mask=mask)).logits

    model = llama()
    wrapped = wrap(model)
    torch.testing.assert_close(logits(wrapped, wrapped), logits(model, model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
def test_models_of_peft():
    """PEFT's wrapper tells neither the embeddings nor, by position, the mask."""
    peft = pytest.importorskip("peft")
    ids, mask = batch()
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    attached = attach_embedding_noise(model, length="true")
    for noise in (added(model, input_ids=ids, attention_mask=mask), added(model, ids, mask)):
        assert not noise[mask == 0].any() and (noise[mask == 1] != 0).any(-1).all()
    attached.remove()
    plain = peft.PeftModel(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    attach_embedding_noise(plain, length="true")
    noise = added(plain, ids, mask)
    assert not noise[mask == 0].any() and noise[mask == 1].any()


def test_copies_have_noise_of_their_own():
    ids, _ = batch()
    model = llama()
    attached = attach_embedding_noise(model)
    other = copy.deepcopy(model)
    attached.remove()
    assert not added(model, input_ids=ids).any() and added(other, input_ids=ids).any()


def test_a_bare_embedding():
    embedding = nn.Embedding(50, 16, padding_idx=0)
    ids, mask = batch()
    clean = embedding(ids)
    with attach_embedding_noise(embedding, length="true"):
        noise = (embedding(ids) - clean).detach()
        assert not noise[mask == 0].any()
        for sample, length in enumerate(LENGTHS):
            assert 0 < noise[sample].abs().max() <= 5 / math.sqrt(length * 16) + 1e-6
    with attach_embedding_noise(embedding):
        flat = embedding(ids[0])
        assert flat.shape == (8, 16) and not torch.equal(flat, clean[0])
    assert torch.equal(embedding(ids), clean)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_tokens_have_no_noise(options):
    for shape in ((0, 3, 4), (2, 0, 4)):
        assert EmbeddingNoise(**options)(torch.ones(shape)).shape == shape


def test_a_schedule_that_goes_on_leaves_removed_noise_removed():
    """Compiled code looks at the level alone."""
    attached = attach_embedding_noise(nn.Embedding(5, 4))
    scheduler = NoiseScheduler(attached, Linear(1.0, steps=4))
    attached.remove()
    scheduler.step()
    assert attached.alpha == 0 and attached.noise.level == 0


def test_what_is_wrong_says_so():
    model = llama()
    with pytest.raises(ValueError, match="length must be one of 'padded', 'true', got 'longest'"):
        attach_embedding_noise(model, length="longest")
    with pytest.raises(ValueError, match="generator='torch' is for what the Trainer draws"):
        attach_embedding_noise(model, std=0.1, generator="torch")
    with pytest.raises(ValueError, match="generator must be one of 'torch', 'counter', got 'philox'"):
        EmbeddingNoise(generator="philox")
    for options in ({"alpha": -1.0}, {"std": math.inf}):
        with pytest.raises(ValueError, match="must be finite and >= 0"):
            attach_embedding_noise(model, **options)
    assert not model.get_input_embeddings()._forward_hooks
    with pytest.raises(TypeError, match="Linear does not tell its embeddings"):
        attach_embedding_noise(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="needs to know padding"):
        attach_embedding_noise(nn.Embedding(3, 3), length="true")
    attach_embedding_noise(model)
    with pytest.raises(RuntimeError, match=r"noise already: AttachedEmbeddingNoise\(alpha=5.0"):
        attach_embedding_noise(model)
    config = transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        attach_embedding_noise(transformers.T5ForConditionalGeneration(config), length="true")
    model = llama()
    attach_embedding_noise(model, length="true")
    ids, mask = batch()
    with pytest.raises(TypeError, match="attention_mask as a tensor"):
        model(input_ids=ids, attention_mask={"full_attention": mask})
    with pytest.raises(ValueError, match="embeddings must have shape"):
        EmbeddingNoise()(torch.ones(3))
    with pytest.raises(TypeError, match="floating dtype, got torch.int64"):
        EmbeddingNoise()(torch.ones(2, 3, 4, dtype=torch.int64))
