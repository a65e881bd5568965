"""Fingerprints tell apart what computes differently, and know again what does not."""

import functools
import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from fastreg.engine import stage as chain
from fastreg.reference import rules
from fastreg.runtime.fingerprint import Unknown, fingerprint


def module(tmp_path, name, source):
    """A module of this source, as if it had been imported from a file."""
    file = tmp_path / f"{name}.py"
    file.write_text(textwrap.dedent(source))
    spec = importlib.util.spec_from_file_location(name, file)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


STAGE = """
    import torch
    from functools import partial

    FACTOR = {factor}

    def helper(x, times={times}):
        return x * times

    class Sizes:
        SHIFT = {shift}

        @staticmethod
        def shifted(x):
            return x + {inner}

    def stage(p, u, at):
        scaled = [helper(FACTOR * u) for _ in range(2)]
        return p - Sizes.shifted(scaled[0]) - Sizes.SHIFT, u, ()
"""
PLAIN = {"factor": "2.0", "times": "3.0", "shift": "4.0", "inner": "5.0"}


@pytest.mark.parametrize("part", PLAIN)
def test_sees_every_number_that_code_can_reach(tmp_path, part):
    """Globals, defaults, constants of classes, code of methods."""
    one, two, again = (
        fingerprint(module(tmp_path, "stages", STAGE.format(**step_scalars)).stage)
        for step_scalars in (PLAIN, {**PLAIN, part: "7.0"}, PLAIN)
    )
    assert one == again != two


def test_a_change_elsewhere_in_a_module_changes_nothing(tmp_path):
    one = module(tmp_path, "stages", STAGE.format(**PLAIN)).stage
    two = module(tmp_path, "stages", STAGE.format(**PLAIN) + "\n    def other():\n        return 1\n").stage
    assert fingerprint(one) == fingerprint(two)


def test_follows_attributes_of_modules(monkeypatch):
    def uses(p):
        return rules.sgd(p, p, None, 1.0)

    before = fingerprint(uses)
    monkeypatch.setattr(rules, "adam", lambda *_: None)
    assert fingerprint(uses) == before
    monkeypatch.setattr(rules, "sgd", lambda *_: None)
    assert fingerprint(uses) != before


def test_sees_what_closures_and_partials_hold():
    def scaled(factor):
        return lambda x: x * factor

    assert fingerprint(scaled(2)) == fingerprint(scaled(2)) != fingerprint(scaled(3))
    assert fingerprint(functools.partial(max, 1)) != fingerprint(functools.partial(max, 2))
    assert fingerprint(1) != fingerprint(True) != fingerprint("1")
    assert fingerprint([1, [2]]) != fingerprint([[1], 2])
    assert fingerprint(torch.float32) != fingerprint(torch.float64)


def test_functions_that_call_each_other():
    assert fingerprint(_even) == fingerprint(_even) != fingerprint(_odd)


def _even(n):
    return n == 0 or _odd(n - 1)


def _odd(n):
    return n != 0 and _even(n - 1)


def test_sees_chains():
    stage = chain.Stage("rules.sgd", rules.sgd, step_scalars=1)
    assert fingerprint(chain.Chain((stage,))) == fingerprint(chain.Chain((chain.Stage(**vars(stage)),)))
    assert fingerprint(chain.Chain((stage,))) != fingerprint(chain.Chain((stage, stage)))


@pytest.mark.parametrize("value", [torch.ones(2), object(), pytest], ids=["tensor", "object", "module"])
def test_what_it_cannot_tell_is_refused(value):
    with pytest.raises(Unknown):
        fingerprint(lambda x: (x, value))


def member(text):
    """A stage that uses a class with such a member."""
    body = textwrap.indent(text, " " * 4)
    return f"import functools\nclass Rule:\n{body}\ndef stage(p, u, at):\n    return Rule() * p, u, ()\n"


def known(stage):
    try:
        return fingerprint(stage)
    except Unknown:
        return "unknown"


CASES = {
    "inherited": """
        class Rule:
            def scaled(self, x):
                return x * {value}

        class Mine(Rule):
            pass

        def stage(p, u, at):
            return p - Mine().scaled(u), u, ()
    """,
    "inherited through a module": """
        import types

        class Rule:
            FACTOR = {value}

        class Middle(Rule):
            pass

        mine = types.ModuleType("mine")
        mine.Rule = type("Rule", (Middle,), {{}})

        def stage(p, u, at):
            return p - mine.Rule.FACTOR * u, u, ()
    """,
    "tuple": member("FACTORS = 1, (2, {value})"),
    "list": member("FACTORS = [1, {value}]"),
    "dictionary": member("FACTORS = {{'a': {value}}}"),
    "dunder constant": member("__factor__ = {value}"),
    "dunder method": member("def __mul__(self, x): return x * {value}"),
    "static method": member("@staticmethod\ndef scaled(x): return x * {value}"),
    "class method": member("@classmethod\ndef scaled(cls, x): return x * {value}"),
    "property": member("@property\ndef factor(self): return {value}"),
    "setter": member("@property\ndef f(self): return 1\n@f.setter\ndef f(self, x): self.x = {value}"),
    "cached property": member("@functools.cached_property\ndef factor(self): return {value}"),
    "partial method": member("scaled = functools.partialmethod(max, {value})"),
    "nested class": member("class Inner:\n    FACTOR = {value}"),
    "slots": member("__slots__ = 'a{value}',"),
    "method of a metaclass": """
        class Kind(type):
            def scaled(cls, x):
                return x * {value}

        class Rule(metaclass=Kind):
            pass

        def stage(p, u, at):
            return Rule.scaled(p), u, ()
    """,
    "named tuple": """
        from typing import NamedTuple

        class Rule(NamedTuple):
            first: float
            factor: float = {value}

        def stage(p, u, at):
            return p - Rule(1.0).factor * u, u, ()
    """,
    "method of a named tuple": """
        from typing import NamedTuple

        class Rule(NamedTuple):
            one: float

            def scaled(self, x):
                return x * {value}

        def stage(p, u, at, rule=Rule(1.0)):
            return p - rule.scaled(u), u, ()
    """,
    "data class": """
        from dataclasses import dataclass, field

        @dataclass
        class Base:
            some: list = field(default_factory=lambda: [{value}])

        @dataclass(frozen=True)
        class Rule:
            factor: float = 1.0
            repeated: int = field(default=2, init=False)

            def __post_init__(self):
                object.__setattr__(self, "more", {value})

        RULE = Rule()

        def stage(p, u, at):
            return p - RULE.more * u * Base().some[0], u, ()
    """,
    "attribute": """
        def helper(x):
            return x * helper.factor

        helper.factor = {value}

        def stage(p, u, at):
            return helper(p), u, ()
    """,
    "in torch's name": """
        import functools, torch

        @functools.wraps(torch.nn.functional.relu)
        def helper(x):
            return x * {value}

        def stage(p, u, at):
            return helper(p), u, ()
    """,
    "in torch's place": """
        import functools, torch

        @functools.wraps(torch.nn.functional.relu)
        def helper(x):
            return x * {value}

        functional = type(torch)("torch.nn.functional")
        functional.relu = helper

        def stage(p, u, at):
            return functional.relu(p), u, ()
    """,
    "class in torch's name": """
        class Size:
            __module__, __qualname__ = "torch", "Size"
            FACTOR = {value}

        def stage(p, u, at):
            return p * Size.FACTOR, u, ()
    """,
    "wrapped by torch": """
        import torch

        @torch.no_grad()
        def helper(x):
            return x * {value}

        def stage(p, u, at):
            return helper(p), u, ()
    """,
    "wrapped": """
        import functools

        def inner(x):
            return x * {value}

        @functools.wraps(inner)
        def helper(*given):
            return helper.__wrapped__(*given)

        def stage(p, u, at):
            return helper(p), u, ()
    """,
    "cached": """
        import functools

        @functools.cache
        def factor():
            return {value}

        def stage(p, u, at):
            return p * factor(), u, ()
    """,
    "partial": """
        import functools

        helper = functools.partial(lambda x, factor: x * factor, factor={value})

        def stage(p, u, at):
            return helper(p), u, ()
    """,
    "default": "def stage(p, u, at, factor={value}):\n    return p * factor, u, ()",
    "keyword default": "def stage(p, u, at, *, factor={value}):\n    return p * factor, u, ()",
    "closure": """
        def make(factor):
            def inner(x):
                return x * factor
            return lambda p, u, at: (inner(p), u, ())

        stage = make({value})
    """,
    "nested code": """
        FACTOR = {value}

        def stage(p, u, at):
            def outer():
                return [FACTOR * each for each in (lambda: [p])()]
            return outer()[0], u, ()
    """,
    "set": """
        def stage(p, u, at):
            return p if at in {{"a", "b", "c", {value}}} else u, u, ()
    """,
    "builtin of its own": """
        def max(x):
            return x * {value}

        def stage(p, u, at):
            return max(p), u, ()
    """,
    "arguments": """
        def helper(*given, **named):
            return len(given)

        if {value} == 2:
            def helper(given, named):
                return len(given)

        def stage(p, u, at):
            return helper(p, u), u, ()
    """,
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_an_edited_stage_is_never_taken_for_the_same(tmp_path, kind):
    """It has another fingerprint, or none."""
    source = textwrap.dedent(CASES[kind])
    one, again, two = (
        known(module(tmp_path, "stages", source.format(value=value)).stage) for value in (2, 2, 5)
    )
    assert one == again and (one == "unknown" or one != two)
    assert (one == "unknown") == (kind == "cached" or kind == "wrapped by torch")


@pytest.mark.parametrize(
    "code",
    [
        "import math\n    return math.pi",
        "from torch import pi\n    return pi",
        "return (lambda: __import__('math'))()",
        "return eval('p')",
        "return globals()['torch']",
        "return getattr(math, 'pi')",
        "return torch.ops.aten.relu(p)",
        "return time.time()",
        "return math",
    ],
)
def test_code_that_could_do_anything_is_refused(tmp_path, code):
    source = f"import math, time, torch\ndef stage(p, u, at):\n    {code}\n"
    with pytest.raises(Unknown):
        fingerprint(module(tmp_path, "stages", source).stage)


def test_collections_within_themselves_and_empty_cells_are_refused():
    items = []
    items.append(items)
    with pytest.raises(Unknown):
        fingerprint(items)

    def early():
        return late

    with pytest.raises(Unknown):
        fingerprint(early)
    late = 1
    assert fingerprint(early) == fingerprint(early)


def test_is_the_same_in_every_process(tmp_path):
    """For a chain of this library, and for every kind of code above, whatever the order of sets is."""
    for i, source in enumerate(CASES.values()):
        (tmp_path / f"stages{i}.py").write_text(textwrap.dedent(source).format(value=2))
    code = """if True:
        import importlib, sys
        from fastreg.engine import stage as chain
        from fastreg.runtime.fingerprint import Unknown, fingerprint
        from fastreg.reference import rules, step

        stage = chain.Stage("rules.sgd", rules.sgd, step_scalars=1)
        print(fingerprint(step.step, chain.Chain((stage,))))
        for i in range(int(sys.argv[2])):
            sys.path.insert(0, sys.argv[1])
            try:
                print(fingerprint(importlib.import_module(f"stages{i}").stage))
            except Unknown:
                print("unknown")
    """
    digests = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), str(len(CASES))], capture_output=True, text=True,
            check=True, env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.split()
        for seed in ("1", "2")
    ]  # fmt: skip
    assert digests[0] == digests[1] and len(digests[0]) == 1 + len(CASES)
    assert len(set(digests[0])) == len(CASES)  # two of them are unknown
