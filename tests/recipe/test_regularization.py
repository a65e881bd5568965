"""Recipes as data, and what they refuse when they are made."""

import copy
import dataclasses
import math
import pickle
import re

import pytest

from fastreg import Regularization
from fastreg.optim.registry import OPTIMIZERS

yaml = pytest.importorskip("yaml")


def test_round_trips(tmp_path, tools):
    recipe = Regularization.from_dict(tools.FULL)
    assert recipe.to_dict() == tools.FULL
    assert set(tools.FULL) == {f.name for f in dataclasses.fields(Regularization)} - {"msam"}
    for text in (recipe.to_yaml(), recipe.to_yaml(tmp_path / "r.yaml")):
        assert Regularization.from_dict(yaml.safe_load(text)) == recipe
    assert Regularization.from_yaml(tmp_path / "r.yaml") == recipe
    assert pickle.loads(pickle.dumps(recipe)) == copy.deepcopy(recipe) == recipe
    assert dataclasses.replace(recipe, clip=2) != recipe


def test_short_forms_and_numbers_as_text():
    """YAML 1.1 takes 1e-3 for text, and `on` for true."""
    recipe = Regularization.from_dict(
        yaml.safe_load("{clip: 1e-1, ema: on, sam: off, lookahead: '4', optimizer: sgd, swa: 3, l1: 1e-3}")
    )
    assert recipe.to_dict() == {
        "optimizer": {"name": "sgd"}, "clip": {"max_norm": 0.1}, "lookahead": {"k": 4}, "ema": {},
        "swa": {"start": 3}, "l1": {"strength": 0.001},
    }  # fmt: skip
    assert Regularization() == Regularization.from_dict({}) == Regularization(clip=None)
    length = Regularization.from_dict(yaml.safe_load("embedding_noise: {length: true}"))
    assert length.embedding_noise == {"length": "true"}


def test_describe_lists_what_is_on():
    text = str(
        Regularization(clip=1.0, dropout={"layers": "linear", "annealing": {"end": 0.1}, "inject": True})
    )
    assert text.splitlines() == [
        "optimizer  name adamw",
        "dropout    layers linear, annealing end 0.1, inject yes",
        "clip       max_norm 1",
    ]


def test_settings_are_copied():
    settings = {"ema": {"decay": 0.5}}
    recipe = Regularization.from_dict(settings)
    recipe.to_dict()["ema"]["decay"] = 0.1
    settings["ema"]["decay"] = 0.2
    assert recipe.ema == {"decay": 0.5}


WRONG = [
    ({"clp": 1}, "a recipe has no field 'clp'; did you mean 'clip'? There are optimizer, weight_decay"),
    ({"clip": {"max_nrm": 1}}, "clip: unknown setting 'max_nrm'; did you mean 'max_norm'?"),
    ({"dropout": {"annealing": {"stop": 1}}}, "dropout.annealing: unknown setting 'stop'"),
    ({"dropout": [{"rate": 0.1}, {"rat": 0.1}]}, "dropout[1]: unknown setting 'rat'"),
    ({"clip": -1}, "clip: max_norm must be > 0, got max_norm=-1.0"),
    ({"clip": {"max_nrm": None}}, "clip: unknown setting 'max_nrm'"),
    ({"clip": {"value": -1}}, "clip.value: clip_value must be finite and >= 0"),
    ({"clip": {"adaptive": 0}}, "clip.adaptive: clipping must be finite and > 0"),
    ({"clip": "much"}, "clip must be a number, got 'much'"),
    ({"clip": {"norm_type": 3}}, "clip: norm_type must be 2 or math.inf"),
    ({"clip": [1, 2]}, "clip must be a number, got [1, 2]"),
    ({"optimizer": "adamv"}, f"optimizer must be one of {str([*OPTIMIZERS])[1:-1]}, got 'adamv'"),
    ({"optimizer": {"name": "sgd", "betas": [0, 0]}}, "optimizer: sgd has no option 'betas'"),
    ({"optimizer": {"betas": [0.9, 1.5]}}, "optimizer: Invalid beta parameter at index 1: 1.5"),
    ({"optimizer": {"betas": [0.9]}}, "optimizer.betas must be a list of 2, got [0.9]"),
    ({"optimizer": {"lr": 1e-3}}, "optimizer: unknown setting 'lr'"),
    ({"weight_decay": -0.1}, "weight_decay must be finite and >= 0, got -0.1"),
    ({"weight_decay": {"kind": "l3"}}, "weight_decay.kind must be one of 'l2', 'decoupled'"),
    ({"weight_decay": {"exclude": 1}}, "weight_decay.exclude must be true or false, got 1"),
    ({"lr_decay": 1.5}, "lr_decay: rate must be in (0, 1], got rate=1.5"),
    ({"dropout": 1.5}, "dropout: rate must be in [0, 1], got rate=1.5"),
    ({"dropout": {"layers": "linear", "rate": 0.1}}, "either a rate or layers: 'linear'"),
    ({"dropout": {"layers": "lin"}}, "dropout.layers must be one of 'linear', 'path', got 'lin'; or "),
    ({"dropout": {"base": 0.1}}, "base goes with layers: linear"),
    ({"dropout": {"roles": "hiden"}}, "dropout.roles: roles must be among 'hidden'"),
    (
        {"dropout": {"annealing": {"start": 2}}},
        "dropout.annealing: start must be in [0, 1], got start=2.0",
    ),
    ({"dropout": {"annealing": {"steps": 1.5}}}, "must be a whole number of steps, or a share of the run"),
    ({"dropout": {"annealing": {"schedule": "early", "end": 0.1}}}, "early has no end"),
    ({"dropout": {"rate": 0.1, "levels": 3}}, "levels goes with annealing"),
    ({"gradient_noise": -1}, "gradient_noise: std must be finite and >= 0"),
    ({"embedding_noise": {"alpha": 1, "std": 1}}, "give either alpha or std"),
    ({"embedding_noise": -1}, "embedding_noise: alpha must be"),
    ({"activation_noise": -1}, "activation_noise: std must be"),
    ({"token_noise": 2}, "token_noise: rate must be"),
    ({"weight_noise": -1}, "weight_noise: std must be"),
    ({"adversarial": {"epsilon": -1}}, "adversarial: epsilon must be"),
    ({"adversarial": "pgd"}, "adversarial must be one of 'fgm', got 'pgd'"),
    ({"r_drop": -1}, "r_drop: alpha must be"),
    ({"sam": {"rho": -1}}, "rho must be finite and >= 0"),
    ({"sam": {"interval": 1.5}}, "sam.interval must be a whole number, got 1.5"),
    ({"sam": True, "msam": True}, "sam and msam both perturb the weights"),
    ({"msam": 0.3, "optimizer": "lion"}, "MSAM needs momentum: SGD(momentum=0.9), Adam or AdamW; got Lion"),
    ({"msam": 0.3, "weight_decay": {"kind": "cautious"}}, "MSAM does not go with decay='cautious'"),
    ({"ema": 1.0}, "ema: decay must be in [0, 1)"),
    ({"ema": [{"decay": 0.9}, {"decay": 0.99}]}, "each average needs a name of its own, got 'ema'"),
    ({"ema": [{"name": "a"}, None]}, "ema[1] must be settings by name, or true for the defaults, got None"),
    (
        {"swa": math.nan},
        "swa must be a whole number of steps, or a share",
    ),
    ({"ema": {"name": "swa"}}, "each average needs a name of its own, got 'swa'"),
    ({"lookahead": {"k": 2.5}}, "lookahead.k must be a whole number, got 2.5"),
    ({"lookahead": {"k": True}}, "lookahead.k must be a number, got True"),
    ({"swa": {"start": True}}, "swa.start must be a number, got True"),
    ({"lookahead": {"alpha": 2}}, "alpha must be in [0, 1]"),
    ({"l1": -1}, "l1: strength must be"),
    ({"l2sp": -1}, "l2sp: strength must be"),
    ("clip", "a recipe is a mapping of fields to settings, got 'clip'"),
]


@pytest.mark.parametrize("settings, said", WRONG, ids=lambda value: str(value)[:60])
def test_bad_settings_are_refused_at_once(settings, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Regularization.from_dict(settings)


def test_errors_of_a_file_name_it(tmp_path):
    path = tmp_path / "broken.yaml"
    for text, said in (
        ("clip: [", "broken.yaml: while parsing"),
        ("clip: -1", "broken.yaml: clip: max_norm"),
        ("clip: 1\nema: 0.9\nclip: 2", "broken.yaml: line 3: 'clip' is there twice"),
        ("clip: {value: 1, value: 2}", "broken.yaml: line 1: 'value' is there twice"),
        ("sam:", "broken.yaml: sam: nothing is in it; write sam: true for the defaults, or sam: false"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=said):
            Regularization.from_yaml(path)
    path.write_text("", encoding="utf-8")
    assert Regularization.from_yaml(path) == Regularization()
    with pytest.raises(FileNotFoundError):
        Regularization.from_yaml(tmp_path / "none.yaml")


def test_missing_pyyaml_is_reported_with_the_fix(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match="pip install pyyaml, or use from_dict"):
        Regularization().to_yaml()
