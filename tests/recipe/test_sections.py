"""The printed recipe and the sections it is made of."""

import re

import pytest

from fastreg import Regularization
from fastreg.recipe.sections import SECTIONS

yaml = pytest.importorskip("yaml")


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


def until_blank(text):
    lines = text.splitlines()
    return lines[: lines.index("")] if "" in lines else lines
