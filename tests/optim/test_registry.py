"""Whatever goes through all optimizers goes through those of the registry."""

import re
from pathlib import Path

import pytest
import torch

import fastreg
from fastreg.optim.fused_optimizer import FusedOptimizer
from fastreg.optim.registry import OPTIMIZERS, OptimizerEntry
from fastreg_benchmarks import chains

README = Path(__file__).resolve().parents[2] / "README.md"


def test_names_all_optimizers_that_users_import():
    public = (getattr(fastreg, name) for name in fastreg.__all__)
    optimizers = {
        member for member in public if isinstance(member, type) and issubclass(member, FusedOptimizer)
    }
    assert {entry.optimizer for entry in OPTIMIZERS.values()} == optimizers
    for entry in OPTIMIZERS.values():
        assert entry.optimizer.__name__ in fastreg.optim.__all__


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_tested_against_an_oracle(name, rules):
    assert OPTIMIZERS[name].optimizer in {rule.ours for rule in rules.values()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_variant_is_audited(name):
    assert OPTIMIZERS[name].variants
    assert OPTIMIZERS[name].variants.keys() <= {part for chain in chains.BUDGETS for part in chain.split("+")}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_recipe_accepts_it(name):
    optimizer, _ = fastreg.Regularization(optimizer=name).apply(torch.nn.Linear(2, 2), lr=0.1)
    assert type(optimizer) is OPTIMIZERS[name].optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_readme_names_it(name):
    (row,) = re.findall(r"^\| optimizers \| (.*)$", README.read_text("utf-8"), re.MULTILINE)
    assert f"`{OPTIMIZERS[name].optimizer.__name__}`" in row


def test_options_are_those_of_the_constructor():
    assert OPTIMIZERS["lion"].options["betas"] == (0.9, 0.99)
    assert "params" not in OPTIMIZERS["sgd"].options

    class Shorter(fastreg.SGD):
        def __init__(self, params, lr=0.1, **options):
            super().__init__(params, lr, **options)

    assert OptimizerEntry(Shorter).options.keys() == {
        "lr", "regularizers", "seed", "bf16", "state_dtype", "nonfinite"
    }  # fmt: skip


def test_every_regularizer_is_audited():
    components = {type(make(1.0, 0.1)).__name__ for make in chains.COMPONENTS.values()}
    assert set(fastreg.optim.regularizers.__all__) <= components


@pytest.mark.parametrize("name", fastreg.optim.regularizers.__all__)
def test_the_readme_names_every_regularizer(name):
    assert f"`{name}" in README.read_text("utf-8")


def test_old_names_are_aliases():
    assert fastreg.Piece is fastreg.Component and "Piece" in fastreg.__all__


def test_packages_are_among_the_public_names():
    assert {"losses", "optim", "privacy"} <= set(fastreg.__all__)
