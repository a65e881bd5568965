"""Token noise: rates, tokens that stay, and errors."""

import math

import pytest
import torch

from fastreg.nn import TokenNoise, functional


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_tokens_are_replaced_at_a_rate(dtype):
    torch.manual_seed(0)
    ids = torch.randint(7, 50, (200, 500), dtype=dtype)
    special = (0, 1, 13, 49)
    mask = torch.rand(200, 500) < 0.8
    actual = TokenNoise(0.3, 50, special)(ids, mask)
    assert actual.dtype == dtype and actual.shape == ids.shape
    stays = ~mask | torch.isin(ids, torch.tensor(special))
    assert torch.equal(actual[stays], ids[stays])
    free, new = ids[~stays], actual[~stays]
    assert not torch.isin(new, torch.tensor(special)).any() and set(new.tolist()) == set(range(50)) - set(
        special
    )
    n, q = len(free), 0.3 * 45 / 46  # of those drawn, one in 46 is the one that was there
    changed = int((free != new).sum())
    assert abs(changed - n * q) < 5 * math.sqrt(n * q * (1 - q))
    drawn = new[free != new]
    counts = torch.bincount(drawn[drawn < 7], minlength=7)[2:].double()  # of those that were never there
    expected = n * 0.3 / 46
    assert ((counts - expected).abs() < 5 * math.sqrt(expected)).all()


def test_tokens_stay():
    ids = torch.randint(10, (40, 50))
    assert TokenNoise(0.5, 10).eval()(ids) is ids and TokenNoise(0.0, 10)(ids) is ids
    assert torch.equal(TokenNoise(1.0, 10, range(9))(ids), torch.where(ids < 9, ids, 9))
    replaced = TokenNoise(1.0, 10)(ids)
    assert abs(float((replaced == ids).double().mean()) - 0.1) < 5 * math.sqrt(0.09 / 2000)
    assert torch.equal(functional.token_noise(ids, 1.0, 10, special_tokens=range(9)), ids.clamp(max=9))
    assert functional.token_noise(ids, 1.0, 10, training=False) is ids


def test_no_rate_of_tokens_compiles_anew(counting):
    graphs, compiler = counting
    module = TokenNoise(0.5, 100, [1, 2])
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    ids = torch.randint(3, 100, (64, 64))
    for rate in (0.5, 0.0, 0.1, 1.0):
        module.rate = rate
        changed = float((compiled(ids, torch.ones_like(ids)) != ids).double().mean())
        assert abs(changed - rate * 97 / 98) < 5 * math.sqrt(0.25 / ids.numel())
    assert len(graphs) == 1


def test_noise_on_tokens_refuses():
    with pytest.raises(TypeError, match="InputNoise"):
        TokenNoise(0.1, 10)(torch.rand(3))
    with pytest.raises(ValueError, match=r"special_tokens must be in \[0, 9\], got \[3, 10\]"):
        TokenNoise(0.1, 10, [10, 3])
    with pytest.raises(ValueError, match="special_tokens must be a whole number >= 0"):
        TokenNoise(0.1, 10, [1.5])
    for make in (TokenNoise, lambda *args: functional.token_noise(torch.zeros(1), *args)):
        with pytest.raises(ValueError, match="vocab_size must be a whole number >= 1, got vocab_size=10.7"):
            make(0.1, 10.7)
    with pytest.raises(ValueError, match="vocab_size must be larger"):
        TokenNoise(0.1, 2, [0, 1])
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\]"):
        TokenNoise(1.5, 10)
    with pytest.raises(ValueError, match="mask must have the shape of the tokens"):
        TokenNoise(0.1, 10)(torch.zeros(2, 3, dtype=torch.int64), torch.ones(3))
    with pytest.raises(ValueError, match="torch.int8 cannot hold those of vocab_size=129"):
        TokenNoise(0.1, 129)(torch.zeros(3, dtype=torch.int8))
    assert TokenNoise(1.0, 128)(torch.zeros(99, dtype=torch.int8)).min() >= 0
