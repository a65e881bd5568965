"""Fingerprints tell apart what computes differently, and know again what does not."""

import functools
import importlib.util
import subprocess
import sys
import textwrap

import pytest
import torch

from fastreg import chain
from fastreg.fingerprint import Unknown, fingerprint
from fastreg.reference import rules


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
        fingerprint(module(tmp_path, "stages", STAGE.format(**numbers)).stage)
        for numbers in (PLAIN, {**PLAIN, part: "7.0"}, PLAIN)
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
    stage = chain.Stage("rules.sgd", rules.sgd, numbers=1)
    assert fingerprint(chain.Chain((stage,))) == fingerprint(chain.Chain((chain.Stage(**vars(stage)),)))
    assert fingerprint(chain.Chain((stage,))) != fingerprint(chain.Chain((stage, stage)))


@pytest.mark.parametrize("held", [torch.ones(2), object(), pytest], ids=["tensor", "object", "module"])
def test_what_it_cannot_tell_is_refused(held):
    with pytest.raises(Unknown):
        fingerprint(lambda x: (x, held))


def test_is_the_same_in_every_process():
    code = (
        "from fastreg import chain, fingerprint; from fastreg.reference import rules, step;"
        "stage = chain.Stage('rules.adam', rules.adam, numbers=6);"
        "print(fingerprint.fingerprint(step.step, chain.Chain((stage,))))"
    )
    found = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(found) == 1
