"""The example transformer."""

import pytest
import torch
from torch.nn import functional

import fastreg
from fastreg.nn import TransformerWithDropout


def small(**options):
    torch.manual_seed(0)
    return TransformerWithDropout(**{"vocab_size": 50, "d_model": 32, "nhead": 4, "num_layers": 2, **options})


def test_its_default_size():
    with torch.device("meta"):
        model = TransformerWithDropout()
    assert len(model.layers) == 12 and model.head.out_features == 50_257
    assert sum(p.numel() for p in model.parameters()) == 163_037_184


def test_it_is_causal():
    model = small().eval()
    tokens = torch.randint(50, (2, 9))
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 50
    a, b = model(tokens), model(changed)
    assert a.shape == (2, 9, 50) and torch.equal(a[:, :6], b[:, :6]) and not torch.equal(a[:, 6:], b[:, 6:])


def test_it_learns():
    model = small(dropout=0.1)
    optimizer = fastreg.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.arange(50).repeat(2)[None, :64]
    losses = []
    for _ in range(60):
        loss = functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_without_dropout_training_is_evaluation():
    model = small(dropout=0.0)
    tokens = torch.randint(50, (2, 9))
    assert torch.equal(model.train()(tokens), model.eval()(tokens))
    dropping = small(dropout=0.3)
    assert not torch.equal(dropping(tokens), dropping(tokens))


def test_refusals():
    with pytest.raises(ValueError, match="nhead must divide d_model, got nhead=5 and d_model=32"):
        small(nhead=5)
    with pytest.raises(ValueError, match="got 9 tokens in a row, max_length is 4"):
        small(max_length=4)(torch.randint(50, (2, 9)))
