"""The printed recipe, and the sections it is made of: all values that are printed are the defaults."""

import inspect
import re

import pytest
import torch

import fastreg
from fastreg import Regularization
from fastreg.optim.registry import OPTIMIZERS
from fastreg.recipe.sections import SECTIONS

yaml = pytest.importorskip("yaml")

ADAMW = OPTIMIZERS["adamw"].options.keys()


def test_the_template_is_a_recipe_and_every_section_of_it_is_one(tools):
    from fastreg.cli.recipe import template

    printed = template()
    optimizer, callbacks = Regularization.from_dict(yaml.safe_load(printed)).apply(tools.gpt2(), lr=0.1)
    assert [callback.name for callback in callbacks] == ["dropout"]
    for name, section in SECTIONS.items():
        assert f"\n{name}:" in printed or f"\n# {name}:" in printed
        start = re.search(rf"^(# )?{name}:$", printed, re.MULTILINE).start()
        lines = until_blank(printed[start:])
        assert len(lines) == 1 + len(section.keys)
        for line in lines[1:]:
            one = "\n".join((lines[0].removeprefix("# "), line.removeprefix("# ")))
            (key,) = yaml.safe_load(one)[name]
            read = section.read(name, yaml.safe_load(one)[name])
            assert key in section.keys and read is not None
            assert line.partition("# ")[2].strip(), "each has a text"


def until_blank(text):
    lines = text.splitlines()
    return lines[: lines.index("")] if "" in lines else lines


def test_a_recipe_of_all_printed_values_round_trips():
    values = {
        name: {key: setting.example for key, setting in section.keys.items() if setting.example is not None}
        for name, section in SECTIONS.items()
        if name != "msam"
    }
    for key in values["optimizer"].keys() - {"name", *ADAMW}:
        del values["optimizer"][key]
    for key in ("base", "increase", "levels"):  # these go with layers and annealing
        del values["dropout"][key]
    recipe = Regularization.from_dict(yaml.safe_load(yaml.safe_dump(values)))
    assert recipe.to_dict() == values
    assert Regularization.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


# What a section is when it is on, as values of the things it makes ------------------------------------------


def components(optimizer):
    engine = getattr(optimizer, "engine", None) or optimizer
    return {type(component).__name__: component for component in engine._components}


def attached(callbacks, name):
    return next(callback for callback in callbacks if callback.name == name)._attached


ATTRIBUTES = {
    "optimizer": lambda model, optimizer, callbacks: optimizer.defaults
    | {"name": type(optimizer).__name__.lower(), "nonfinite": optimizer._nonfinite},
    "weight_decay": lambda model, optimizer, callbacks: {
        "rate": max(group["weight_decay"] for group in optimizer.param_groups), "kind": optimizer._decay_kind,
        "exclude": min(group["weight_decay"] for group in optimizer.param_groups) == 0,
    },
    "lr_decay": lambda model, optimizer, callbacks: {
        "rate": optimizer.param_groups[-2]["lr"] / optimizer.param_groups[-1]["lr"]
    },
    "dropout": lambda model, optimizer, callbacks: {
        "rate": model.transformer.h[1].mlp.dropout.p, "base": model.transformer.h[0].mlp.dropout.p,
        "roles": ["hidden"] if model.transformer.drop.p == 0.3 else ["embedding"],
        "inject": hasattr(model.transformer.h[0].attn, "fastreg_dropout"),
    },
    "clip": lambda model, optimizer, callbacks: vars(components(optimizer)["ClipNorm"]),
    "gradient_noise": lambda model, optimizer, callbacks: {
        key: getattr(components(optimizer)["GradientNoise"], key) for key in SECTIONS["gradient_noise"].keys
    },
    "embedding_noise": lambda model, optimizer, callbacks: {
        "alpha": attached(callbacks, "embedding_noise").noise.alpha,
        "length": attached(callbacks, "embedding_noise").noise.length,
    },
    "activation_noise": lambda model, optimizer, callbacks: {
        "std": attached(callbacks, "activation_noise").std,
        "kind": attached(callbacks, "activation_noise").kind,
    },
    "token_noise": lambda model, optimizer, callbacks: {"rate": attached(callbacks, "token_noise").rate},
    "weight_noise": lambda model, optimizer, callbacks: callbacks[0]._attached.param_groups[0],
    "adversarial": lambda model, optimizer, callbacks: {
        "method": type(callbacks[0]._attack).__name__.lower(), "epsilon": callbacks[0]._attack.epsilon,
    },
    "r_drop": lambda model, optimizer, callbacks: {"alpha": callbacks[0]._alpha},
    "sam": lambda model, optimizer, callbacks: optimizer.param_groups[0] | {
        "interval": optimizer.interval, "start_step": optimizer.start_step,
        "perturb": "all" if all("rho" in group for group in optimizer.param_groups) else "norms",
    },
    "msam": lambda model, optimizer, callbacks: vars(components(optimizer)["MSAM"]),
    "lookahead": lambda model, optimizer, callbacks: vars(components(optimizer)["SlowWeights"]),
    "ema": lambda model, optimizer, callbacks: vars(components(optimizer)["EMA"]),
    "swa": lambda model, optimizer, callbacks: {
        **vars(components(optimizer)["SWA"]), "start": components(optimizer)["SWA"].start / 100
    },
    "l1": lambda model, optimizer, callbacks: vars(components(optimizer)["L1"]),
    "l2sp": lambda model, optimizer, callbacks: vars(components(optimizer)["L2SP"]),
}  # fmt: skip
"""Of each section: its settings, as they are in what `apply` makes."""

DEPENDENT = {
    "optimizer": {"capturable", "bf16"} | SECTIONS["optimizer"].keys.keys() - {"name", *ADAMW},
    "dropout": {"increase", "levels"},
    "weight_noise": {"rounding"}, "adversarial": {"rounding"}, "sam": {"rounding"},
}  # fmt: skip
"""Settings that the test below compares: of other optimizers, or turned on by other settings."""


def test_all_sections_are_checked_below():
    assert set(ATTRIBUTES) == set(SECTIONS)


def without_main_key(name):
    """A section with one setting at its default, not the main one; `True` if there is no other."""
    section = SECTIONS[name]
    for key, setting in section.keys.items():
        if key not in {section.short, "base", *DEPENDENT.get(name, ())} and setting.example not in (
            None,
            "linear",
        ):
            return {key: setting.example}
    return True


@pytest.mark.parametrize("settings", ["true", "without its main key"])
@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_is_on_with_the_printed_defaults(name, settings, tools):
    """All keys: the printed value is that of what is made."""
    if name == "optimizer" and settings == "true":
        pytest.skip("always on")
    value = True if settings == "true" else without_main_key(name)
    model = tools.gpt2(0.3)
    optimizer, callbacks = Regularization.from_dict({name: value}).apply(model, lr=0.1, steps=100)
    actual = ATTRIBUTES[name](model, optimizer, callbacks)
    section, checked = SECTIONS[name], set()
    for key, setting in section.keys.items():
        if key in actual and setting.example is not None and key not in DEPENDENT.get(name, ()):
            value = list(actual[key]) if isinstance(actual[key], tuple) else actual[key]
            expected = setting.example
            assert value == (pytest.approx(expected) if isinstance(expected, float) else expected), key
            checked.add(key)
    unchecked = {key for key, setting in section.keys.items() if setting.example is not None} - checked
    assert unchecked <= DEPENDENT.get(name, set())
    assert section.short in checked


@pytest.mark.parametrize("name", [name for name in SECTIONS if name != "optimizer"])
def test_a_section_that_is_true_changes_training(name, tools):
    recipe = {"optimizer": {"name": "sgd", "momentum": 0.9}} | ({"r_drop": 1.0} if name == "dropout" else {})
    off, on = (
        tools.trained(settings, model=tools.gpt2(0.3), evaluate=True)
        for settings in (recipe, recipe | {name: True})
    )
    assert not all(map(torch.equal, off[0], on[0]))


CLASSES = {
    "optimizer": [entry.optimizer for entry in OPTIMIZERS.values()],
    "weight_noise": [fastreg.WeightNoise], "sam": [fastreg.SAM],
    "dropout": [fastreg.layerwise.DropoutScheduler, fastreg.schedules.LinearLayers],
    "adversarial": [fastreg.FGM],
}  # fmt: skip


@pytest.mark.parametrize(
    "name, key", [(name, key) for name, keys in DEPENDENT.items() for key in sorted(keys)]
)
def test_settings_that_depend_on_others_have_the_default_of_their_class(name, key):
    signatures = (inspect.signature(cls).parameters for cls in CLASSES[name])
    default = next(parameters[key].default for parameters in signatures if key in parameters)
    assert SECTIONS[name].keys[key].example == default
