"""R-Drop against the authors' formula, and on real models."""

import math
import types
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import fastreg
from fastreg.losses.r_drop import RDrop, _SymmetricKL, shifts


def naive(logits, logits2, labels, alpha, ignore_index=-100, **options):
    """As the authors have it, in float64 and over the positions that count."""
    keep = labels != ignore_index
    a, b, labels = logits.double()[keep], logits2.double()[keep], labels[keep]
    p, q = F.log_softmax(a, -1), F.log_softmax(b, -1)
    kl = F.kl_div(p, q.exp(), reduction="sum") + F.kl_div(q, p.exp(), reduction="sum")
    cross_entropy = (F.cross_entropy(a, labels, **options) + F.cross_entropy(b, labels, **options)) / 2
    return cross_entropy + alpha * kl / 2 / len(labels)


def drawn(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    logits = [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for _ in range(2)]
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    return *logits, labels


WEIGHT = torch.linspace(0.5, 1.5, 11)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"weight": WEIGHT}], ids=("plain", "smoothed", "weighted")
)
@pytest.mark.parametrize("shape", [(6, 11), (3, 5, 11)])
def test_loss_and_gradients_are_those_of_the_formula(shape, options, close, number):
    a, b, labels = drawn(*shape)
    labels.view(-1)[::3] = -100
    loss = fastreg.r_drop_loss(a, b, labels, 2.5, **options)
    theirs = {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    expected = naive(a, b, labels, 2.5, **theirs)
    assert number(loss) == pytest.approx(number(expected), rel=1e-6)
    close(torch.autograd.grad(loss, (a, b)), torch.autograd.grad(expected, (a, b)))


def test_probabilities_as_labels(close):
    a, b, _ = drawn(4, 5)
    soft = torch.rand(4, 5).softmax(-1)
    expected = (F.cross_entropy(a, soft) + F.cross_entropy(b, soft)) / 2
    close(fastreg.r_drop_loss(a, b, soft, 0.0), expected)
    assert fastreg.r_drop_loss(a, b, soft, 1.0) > expected


def test_equal_logits_give_the_cross_entropy_to_the_bit():
    a, _, labels = drawn(64, 101)
    assert torch.equal(fastreg.r_drop_loss(a, a.clone(), labels, 5.0), F.cross_entropy(a, labels))


def test_sum_is_the_mean_times_what_counts(number):
    a, b, labels = drawn(6, 11)
    labels[0] = -100
    mean, total = (fastreg.r_drop_loss(a, b, labels, 2.0, reduction=r) for r in ("mean", "sum"))
    assert number(total) == pytest.approx(5 * number(mean), rel=1e-6)


def test_padding_never_counts():
    a, b, labels = drawn(3, 5, 11)
    labels[:, 3:] = 7
    wild = b.detach().clone()
    wild[:, 3:] *= 1e4
    losses = [fastreg.r_drop_loss(a, each, labels, 1.0, ignore_index=7) for each in (b, wild)]
    assert torch.equal(*losses)
    (gradient,) = torch.autograd.grad(losses[0], b)
    assert not gradient[labels == 7].any() and gradient[labels != 7].any()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0])
def test_kl_is_never_negative(scale):
    generator = torch.Generator().manual_seed(6)
    p = F.log_softmax(torch.randn(200, 31, generator=generator), -1)
    q = F.log_softmax(p + scale * torch.randn(200, 31, generator=generator), -1)
    assert (_SymmetricKL.apply(p, q) >= 0).all()


def test_kl_has_derivatives_of_any_order():
    p, q = (torch.randn(3, 4, dtype=torch.float64).log_softmax(-1).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(_SymmetricKL.apply, (p, q))
    assert torch.autograd.gradgradcheck(_SymmetricKL.apply, (p, q))


def test_classes_that_are_masked_out(number):
    a, b, labels = drawn(4, 5)
    labels.clamp_(max=3)
    masked = [each.detach().index_fill(-1, torch.tensor([4]), -math.inf).requires_grad_() for each in (a, b)]
    loss = fastreg.r_drop_loss(*masked, labels, 1.0)
    assert number(loss) == pytest.approx(
        number(fastreg.r_drop_loss(a[:, :4], b[:, :4], labels, 1.0)), rel=1e-6
    )
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, masked))


def test_bfloat16_is_worked_out_in_float32():
    a, b, labels = drawn(16, 1000, dtype=torch.bfloat16)
    wide = [each.detach().float() for each in (a, b)]
    assert torch.equal(fastreg.r_drop_loss(a, b, labels), fastreg.r_drop_loss(*wide, labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": -1.0}, "alpha must be"),
        ({"reduction": "none"}, "reduction must be"),
        ({"logits2": torch.zeros(4, 6)}, "one shape"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "labels must be integers"),
        ({"labels": torch.zeros(4)}, "labels must be integers"),
        ({"logits": torch.zeros(4, 1), "logits2": torch.zeros(4, 1)}, "two or more"),
    ],
)
def test_what_r_drop_loss_refuses(change, message):
    arguments = {"logits": torch.zeros(4, 5), "logits2": torch.zeros(4, 5), "labels": torch.zeros(4).long()}
    with pytest.raises(ValueError, match=message):
        fastreg.r_drop_loss(**{**arguments, **change})


# R-Drop of models -------------------------------------------------------------------------------------------


def gpt2(rate):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), rate)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, **rates
    )
    return transformers.GPT2LMHeadModel(config).train()


def language_batch():
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(50, (3, 8), generator=generator)
    labels = ids.clone()
    labels[0, 5:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_without_dropout_a_model_gives_its_own_loss(number):
    net, batch = gpt2(0.0), language_batch()
    loss = net(**batch).loss
    apart = fastreg.r_drop(net, batch, 5.0, passes="apart")
    assert torch.equal(apart.loss, loss) and number(apart.kl) == 0
    together = fastreg.r_drop(net, batch, 5.0)
    assert number(together.loss) == pytest.approx(number(loss), rel=1e-6)
    assert torch.allclose(together.logits, apart.logits, atol=1e-6)


@pytest.mark.parametrize("passes", ["together", "apart"])
def test_a_language_model_with_dropout(passes, number):
    """Logits at t are for the label at t + 1, which may be padding."""
    net, batch = gpt2(0.3), language_batch()
    result = fastreg.r_drop(net, batch, 2.0, passes=passes)
    assert result.kl > 0 and not torch.equal(result.logits, result.logits2)
    shifted = result.logits[:, :-1], result.logits2[:, :-1], batch["labels"][:, 1:]
    assert number(result.loss) == pytest.approx(number(fastreg.r_drop_loss(*shifted, 2.0)), rel=1e-6)
    result.loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_both_ways_agree_under_fixed_masks(number):
    class Fixed(nn.Module):
        """Drops other features in each pass, by the number of samples that passed before."""

        def __init__(self):
            super().__init__()
            self.linear, self.seen = nn.Linear(6, 4), 0

        def forward(self, x):
            generator = torch.Generator().manual_seed(8)
            masks = torch.rand(10, 6, generator=generator).gt(0.5).float()
            self.seen, first = self.seen + len(x), self.seen
            return self.linear(x * masks[first : first + len(x)])

    torch.manual_seed(1)
    net, x, y = Fixed(), torch.randn(5, 6), torch.randint(4, (5,))
    together = fastreg.r_drop(net, (x, y), 3.0)
    net.seen = 0
    apart = fastreg.r_drop(net, (x, y), 3.0, passes="apart")
    for a, b in zip(together, apart, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)
    assert number(apart.loss) == pytest.approx(
        number(fastreg.r_drop_loss(apart.logits, apart.logits2, y, 3.0)), rel=1e-6
    )


def test_sums_divided_by_the_trainers_number(number):
    """With gradient accumulation, Hugging Face divides sums by the number of tokens of a whole window."""
    net, batch = gpt2(0.0), language_batch()
    count = int((batch["labels"][:, 1:] != -100).sum())
    for passes in ("together", "apart"):
        result = fastreg.r_drop(net, batch, 1.0, passes=passes, num_items_in_batch=4 * count)
        assert number(result.loss) == pytest.approx(number(net(**batch).loss) / 4, rel=1e-5)
        result = fastreg.r_drop(gpt2(0.3), batch, 1.0, passes=passes, num_items_in_batch=4 * count)
        shifted = result.logits[:, :-1], result.logits2[:, :-1], batch["labels"][:, 1:]
        assert result.kl > 0
        assert number(result.loss) == pytest.approx(number(fastreg.r_drop_loss(*shifted)) / 4, rel=1e-5)


def test_what_all_samples_share_passes_once(number):
    net, batch = gpt2(0.0), language_batch()
    result = fastreg.r_drop(net, {**batch, "position_ids": torch.arange(8)[None]})
    assert number(result.loss) == pytest.approx(number(net(**batch).loss), rel=1e-6)


@pytest.mark.parametrize("passes", ["together", "apart"])
def test_batches_in_named_tuples(passes):
    class Batch(NamedTuple):
        inputs: Any
        labels: torch.Tensor

    class Inputs(NamedTuple):
        x: torch.Tensor
        scale: float

    class Scaled(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs.x * inputs.scale)

    net, x, y = Scaled(6, 4), torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    result = fastreg.r_drop(net, Batch(Inputs(x, 2.0), y), passes=passes)
    torch.testing.assert_close(result.loss, F.cross_entropy(F.linear(2 * x, net.weight, net.bias), y))


@pytest.mark.parametrize(
    ("name", "encoder", "expected"),
    [
        ("GPT2LMHeadModel", False, True),
        ("LlamaForCausalLM", False, True),
        ("LlavaForConditionalGeneration", False, True),
        ("T5ForConditionalGeneration", True, False),
        ("XLMWithLMHeadModel", False, False),
        ("BertForMaskedLM", False, False),
    ],
)
def test_which_models_predict_the_next_token(name, encoder, expected):
    net = type(name, (nn.Linear,), {"config": types.SimpleNamespace(is_encoder_decoder=encoder)})(2, 2)
    assert shifts(net) is expected
    adapted = nn.Module()
    adapted.peft_config = {}
    adapted.get_base_model = lambda: net
    assert shifts(adapted) is expected


def test_a_classifier_with_its_own_loss(number):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=3, hidden_dropout_prob=0.3,
    )  # fmt: skip
    net = transformers.BertForSequenceClassification(config).train()
    batch = {"input_ids": torch.randint(50, (4, 6)), "labels": torch.tensor([0, 1, 2, 1])}
    result = fastreg.r_drop(net, batch, 2.0)
    expected = fastreg.r_drop_loss(result.logits, result.logits2, batch["labels"], 2.0)
    assert number(result.loss) == pytest.approx(number(expected), rel=1e-6) and result.kl > 0


@pytest.mark.parametrize("kind", ["mapping", "tuple", "object"])
@pytest.mark.parametrize("passes", ["together", "apart"])
def test_models_that_return_their_loss_and_logits_in_other_ways(kind, passes):
    class WithLoss(nn.Linear):
        def forward(self, x, labels):
            logits = super().forward(x)
            loss = F.cross_entropy(logits, labels)
            if kind == "tuple":
                return loss, logits
            return {"loss": loss, "logits": logits} if kind == "mapping" else RDrop(loss, logits, *[None] * 3)

    net, x, y = WithLoss(6, 4), torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    result = fastreg.r_drop(net, {"x": x, "labels": y}, passes=passes)
    logits = F.linear(x, net.weight, net.bias)
    assert torch.allclose(result.logits, logits) and torch.allclose(result.loss, F.cross_entropy(logits, y))


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"x": torch.zeros(4, 6)}, ValueError, "must have labels"),
        (torch.zeros(4, 6), TypeError, "mapping with labels"),
        ((torch.zeros(4, 6), torch.zeros(4)), ValueError, "must be classes"),
        ((torch.zeros(3, 6), torch.zeros(4).long()), ValueError, "passes='apart'"),
    ],
)
def test_what_r_drop_refuses(batch, error, message):
    with pytest.raises(error, match=message):
        fastreg.r_drop(nn.Linear(6, 4), batch)
