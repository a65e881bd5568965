"""FGM: embeddings move by their gradient, as the recipe that people copy has it, and come back."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastreg
from fastreg import FGM


class Model(nn.Module):
    def __init__(self, dtype=torch.float32, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.word_embeddings = nn.Embedding(50, 8, dtype=dtype)
        self.head = nn.Linear(8, 50, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.word_embeddings.weight

    def get_input_embeddings(self):
        return self.word_embeddings

    def forward(self, ids):
        return self.head(self.word_embeddings(ids).tanh().mean(1))


IDS = torch.tensor([[1, 2, 3], [4, 5, 3]])


def backward(model):
    loss = functional.cross_entropy(model(IDS).float(), torch.tensor([7, 8]))
    loss.backward()
    return loss


class Recipe:
    """As it is copied from one project to the next."""

    def __init__(self, model, epsilon):
        self.model, self.epsilon, self.backup = model, epsilon, {}

    def attack(self):
        for name, p in self.model.named_parameters():
            if "word_embeddings" in name:
                self.backup[name] = p.data.clone()
                norm = torch.norm(p.grad)
                if norm != 0 and not torch.isnan(norm):
                    p.data.add_(self.epsilon * p.grad / norm)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("modules", [None, "word_emb"])
def test_is_the_recipe(backend, tied, modules):
    ours, theirs = Model(tied=tied), Model(tied=tied)
    with fastreg.use_backend(backend):
        fgm, recipe = FGM(ours, 0.7, modules), Recipe(theirs, 0.7)
        backward(ours)
        backward(theirs)
        start = ours.word_embeddings.weight.detach().clone()
        recipe.attack()
        with fgm.attacked():
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
            moved = ours.word_embeddings.weight.detach() - start
            assert math.isclose(float(moved.norm()), 0.7, rel_tol=1e-5)
            backward(ours)
        backward(theirs)
        assert torch.equal(ours.word_embeddings.weight, start)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_comes_back_bit_for_bit(dtype):
    model = Model(dtype)
    fgm = FGM(model)
    backward(model)
    start, address = model.word_embeddings.weight.detach().clone(), model.word_embeddings.weight.data_ptr()
    for epsilon in (1.0, 0.3):
        fgm.epsilon = epsilon
        fgm.attack()
        away = model.word_embeddings.weight.detach().float() - start.float()
        assert not torch.equal(model.word_embeddings.weight, start)
        if dtype == torch.float32:
            assert math.isclose(float(away.norm()), epsilon, rel_tol=1e-5)
        fgm.attack()  # from where it was
        fgm.restore()
        fgm.restore()
        assert torch.equal(model.word_embeddings.weight, start)
    assert model.word_embeddings.weight.data_ptr() == address


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_gradient_without_a_norm_moves_nothing(value):
    model = Model()
    backward(model)
    if value:
        model.word_embeddings.weight.grad[3, 2] = value
    else:
        model.word_embeddings.weight.grad.zero_()
    start = model.word_embeddings.weight.detach().clone()
    with FGM(model).attacked():
        assert torch.equal(model.word_embeddings.weight, start)
    assert torch.equal(model.word_embeddings.weight, start)


def test_a_scaled_loss_moves_as_far():
    plain, scaled = Model(), Model()
    for model, scale in ((plain, 1.0), (scaled, 1024.0)):
        (scale * functional.cross_entropy(model(IDS), torch.tensor([7, 8]))).backward()
        FGM(model).attack()
    torch.testing.assert_close(plain.word_embeddings.weight, scaled.word_embeddings.weight, rtol=0, atol=1e-6)


def test_an_exception_brings_weights_back():
    model = Model()
    backward(model)
    start = model.word_embeddings.weight.detach().clone()
    with pytest.raises(KeyError), FGM(model).attacked():
        raise KeyError
    assert torch.equal(model.word_embeddings.weight, start)


def test_every_parameter_has_a_norm_of_its_own():
    model = Model()
    backward(model)
    start = [p.detach().clone() for p in model.parameters()]
    with FGM(model, 0.5, [model.word_embeddings, model.head]).attacked():
        for p, before in zip(model.parameters(), start, strict=True):
            assert math.isclose(float((p.detach() - before).norm()), 0.5, rel_tol=1e-5)


def test_trains_a_transformer():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    fgm, optimizer = FGM(model, 0.1), fastreg.AdamW(model.parameters(), lr=1e-2)
    ids, losses = torch.randint(0, 40, (4, 12)), []
    assert [p.shape for p in fgm.parameters] == [(40, 16)]
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        with fgm.attacked():
            adversarial = model(ids, labels=ids).loss
            adversarial.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_errors():
    model = Model()
    with pytest.raises(ValueError, match="epsilon must be"):
        FGM(model, -1.0)
    with pytest.raises(ValueError, match="rounding"):
        FGM(model, rounding="up")
    with pytest.raises(ValueError, match="get_input_embeddings"):
        FGM(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="there are word_embeddings.weight"):
        FGM(model, modules="emb_tokens")
    with pytest.raises(ValueError, match="parameters"):
        FGM(model, modules=nn.Tanh())
    with pytest.raises(RuntimeError, match="backward"):
        FGM(model).attack()
    model.word_embeddings.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="frozen"):
        FGM(model).attack()
