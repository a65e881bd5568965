"""`fastreg private` from end to end, and the private contender of `fastreg compare`."""

import json
import re

import pytest
import torch

pytest.importorskip("opacus")
pytest.importorskip("sklearn")

import fastreg  # noqa: E402
from fastreg.cli import main, private  # noqa: E402
from fastreg.cli.compare import choice, contenders  # noqa: E402
from fastreg.cli.compare.setup import Setup  # noqa: E402


@pytest.mark.filterwarnings("ignore:Optimal order is the")
def test_trains_twice_and_says_what_is_spent(capsys):
    threads = torch.get_num_threads()
    assert main(["private", "--steps", "60", "--epsilon", "8"]) == 0
    out = capsys.readouterr().out
    accuracies = [
        float(percentage) for percentage in re.findall(r"([\d.]+)% of samples held back right", out)
    ]
    assert len(accuracies) == 2 and min(accuracies) > 80  # 63 % of them are benign
    (spent,) = re.findall(r"epsilon ([\d.]+) \(delta=0.0001, opacus [\d.]+ RDP\)", out)
    assert 7.9 < float(spent) <= 8
    assert "Not defended against" in out and torch.get_num_threads() == threads


def test_shares_are_apart_and_scaled_by_public_numbers():
    train, test = private._data()
    rows = {tuple(row.tolist()) for row in train.tensors[0]}
    assert len(rows) == 455 and not any(tuple(row.tolist()) in rows for row in test.tensors[0])
    assert train.tensors[0].abs().max() <= 3 and train.tensors[0].std(0).min() > 0.1


@pytest.mark.parametrize(
    "options, match",
    [
        (["--epsilon", "1e-9"], "--epsilon 1e-09: The privacy budget is too low"),
        (["--sample-rate", "1.5"], "probabilities, got 1.5"),
        (["--delta", "1"], "probabilities"),
        (["--steps", "0"], ">= 1"),
        (["--accountant", "gdp"], "'rdp', 'prv'"),
    ],
)
def test_refuses(options, match, capsys):
    assert main(["private", *options]) == 2
    assert match in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Optimal order is the")
def test_contender(tmp_path, capsys):
    """The table tells what is spent, and what to think of it."""
    pytest.importorskip("transformers")
    size = ["--block-size", "16", "--train-tokens", "160", "--val-tokens", "160", "--batch-size", "2"]
    steps = ["--steps", "4", "--eval-every", "2", "--device", "cpu"]
    assert main(["compare", "--with", "plain,dp=2", *size, *steps, "--out", str(tmp_path)]) == 0
    plain, dp = json.loads((tmp_path / "compare.json").read_text())["contenders"]
    expected = fastreg.privacy.epsilon(noise_multiplier=2.0, sample_rate=0.2, steps=4, delta=1e-5)
    assert (
        dp["privacy_budget"].startswith(f"epsilon {expected}") and "had batches been" in dp["privacy_budget"]
    )
    assert plain["privacy_budget"] is None and plain["train_loss"] != dp["train_loss"]
    assert f"dp=2: epsilon {expected:.4g}" in " ".join(capsys.readouterr().out.split())


def test_contender_repeats_its_noise():
    def steps():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        setup = Setup(model, 0.1, 0.0, seed=3, steps=4, batch_size=2, windows=10)
        contenders.ENTRIES["dp"].apply(setup, 1.0)
        optimizer, _ = setup.make()
        optimizer.step()
        return model.weight.detach(), optimizer

    (first, optimizer), (second, _) = steps(), steps()
    assert torch.equal(first, second)
    assert isinstance(optimizer, fastreg.DPOptimizer) and isinstance(optimizer.base_optimizer, fastreg.AdamW)
    assert optimizer.accountant.history == [(1.0, 0.2, 1)] and optimizer.expected_batch_size == 2


def test_contender_may_come_before_torch():
    setup = Setup(torch.nn.Linear(3, 2), 0.1, 0.0, seed=3, steps=4, batch_size=2, windows=10)
    choice.parse("dp+torch")[0].apply(setup)
    optimizer, _ = setup.make()
    assert type(optimizer.base_optimizer) is torch.optim.AdamW and optimizer.expected_batch_size == 2


def test_contender_is_refused_where_samples_would_count_twice(capsys):
    pytest.importorskip("transformers")
    for combination, match in (
        ("dp+fgm", "adversarial makes several passes"), ("dp+sam", "another release"),
        ("dp+dp=2", "dp is given more than once, as 0.5 and 2"),
    ):  # fmt: skip
        assert main(["compare", "--with", combination]) == 2
        assert match in capsys.readouterr().err
