"""Modules and functions that add noise: levels, masks, modes, and errors."""

import copy
import math

import pytest
import torch
from torch import nn

from fastreg.nn import ActivationNoise, InputNoise, TokenNoise, functional

pytestmark = pytest.mark.usefixtures("reference")


def noisy(x, kind="additive", std=0.3, seed=1):
    """Adds noise with the seed pinned."""
    torch.manual_seed(seed)
    return functional.gaussian_noise(x, std, kind=kind)


def test_a_level_for_each_sample_and_a_mask():
    x = torch.randn(3, 5, 8)
    level, mask, each = torch.tensor([0.0, 0.1, 2.0]), torch.rand(3, 5) < 0.5, torch.rand(3, 5, 8)
    torch.manual_seed(0)
    z = functional.gaussian_noise(torch.zeros_like(x), 1.0)
    torch.manual_seed(0)
    actual = functional.gaussian_noise(x, level, mask=mask)
    assert torch.equal(actual, torch.where(mask[..., None], x + level[:, None, None] * z, x))
    torch.manual_seed(0)
    assert torch.equal(functional.gaussian_noise(x, each, mask=mask[:, 0]),
                       torch.where(mask[:, :1, None], x + each * z, x))  # fmt: skip
    torch.manual_seed(0)
    u = functional.uniform_noise(torch.zeros_like(x), 1.0)
    torch.manual_seed(0)
    assert torch.equal(
        functional.uniform_noise(x, 0.5, mask=mask), torch.where(mask[..., None], x + 0.5 * u, x)
    )


@pytest.mark.parametrize("kind", ["additive", "multiplicative"])
def test_no_std_compiles_anew(kind, x, counting):
    graphs, compiler = counting
    module = InputNoise(0.5, kind)
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    for i in range(12):
        module.std = i / 10
        torch.manual_seed(1)
        assert torch.equal(compiled(x), noisy(x, kind, i / 10))
    assert len(graphs) == 1


def test_modules_train_alone(x):
    for module in (InputNoise(0.5), ActivationNoise(0.5, "multiplicative")):
        assert not torch.equal(module(x), x) and module.eval()(x) is x
        assert not module.state_dict() and copy.deepcopy(module).std == 0.5
    assert InputNoise(0.0)(x) is x
    assert repr(InputNoise(0.5)) == "InputNoise(std=0.5, kind='additive')"


def test_a_level_outlives_casts_and_meta(x):
    module = nn.Sequential(InputNoise(0.1)).bfloat16()
    assert module[0].level == torch.tensor(0.1) and module[0].level.dtype == torch.float32
    module = nn.Sequential(InputNoise(0.1), TokenNoise(0.1, 10, [3])).to("meta").to_empty(device="cpu")
    assert module[0].level == torch.tensor(0.1)
    assert module[1].drop_thresholds == 6554 and module[1].special.tolist() == [3]


def test_what_is_wrong_says_so(x):
    with pytest.raises(TypeError, match="TokenNoise"):
        InputNoise(0.1)(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="TokenNoise"):
        InputNoise(0.1).eval()(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="floating dtype, got torch.int64"):
        functional.gaussian_noise(torch.zeros(3, dtype=torch.int64))
    for bad in (-0.1, math.inf, math.nan, torch.tensor([0.1, -0.2])):
        with pytest.raises(ValueError, match="std must be finite and >= 0, got"):
            functional.gaussian_noise(x, bad)
    with pytest.raises(ValueError, match="magnitude must be finite"):
        functional.uniform_noise(x, -1.0)
    with pytest.raises(ValueError, match="std.detach()"):
        functional.gaussian_noise(x, torch.tensor(0.1, requires_grad=True))
    with pytest.raises(ValueError, match="kind must be one of 'additive', 'multiplicative', got 'uniform'"):
        InputNoise(0.1, "uniform")
    with pytest.raises(ValueError, match="first sizes of the input"):
        functional.gaussian_noise(x, torch.ones(3))
    with pytest.raises(ValueError, match="mask must have the first sizes"):
        functional.gaussian_noise(x, 0.1, mask=torch.ones(3))
    with pytest.raises(TypeError, match="std must be a number"):
        InputNoise("0.1")
    module = InputNoise(0.1)
    with pytest.raises(ValueError, match="std=-1"):
        module.std = -1
    assert module.std == 0.1 and module.level == torch.tensor(0.1)


def test_a_level_check_takes_tensors_elsewhere_as_they_are():
    meta = torch.empty(3, device="meta")
    assert functional.check_level(meta) is meta
