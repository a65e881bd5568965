"""`tools/lint.py` complains about what it should, and about nothing else."""

import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "lint.py"
spec = importlib.util.spec_from_file_location("lint", TOOL)
lint = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lint)

MODULE = '"""Adds numbers, as an example."""\n'
MANY = ", ".join(f"a{i}" for i in range(13))


def complaints(tmp_path, source, package="fastreg", head=MODULE):
    file = tmp_path / package / "module.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(head + source)
    return [text for _, text in lint.check(file)]


@pytest.mark.parametrize(
    "source, expected",
    [
        ("found = 1\n", "`found` may mean many things: say what it holds"),
        ("def f(given): pass\n", "`given` may mean many things: say what it holds"),
        (
            "class A:\n    def f(self):\n        self._held = 1\n",
            "`_held` may mean many things: say what it holds",
        ),
        ("def told(): pass\n", "`told` may mean many things: say what it holds"),
        ("PLACE = 1\n", "`PLACE` may mean many things: say what it holds"),
        ("for place in []: pass\n", "`place` may mean many things: say what it holds"),
        (f"def f({MANY}): pass\n", "`f` takes 13 parameters, 12 are the most"),
        ('def f():\n    """Adds."""\n', "'Adds.': say in at least 5 words what it does"),
        (
            'def f():\n    """The sum of all these numbers."""\n',
            "'The sum of all these numbers.': begin with what it does, as in 'Returns ...'",
        ),
        (
            'def f():\n    """Returns the sum of all numbers"""\n',
            "'Returns the sum of all numbers': end the sentence with a full stop",
        ),
        ('class A:\n    """What a sum is made of."""\n', "'What a sum is made of.': name the thing"),
        ('def f():\n    """Returns all numbers, likewise sorted."""\n', "'likewise': write it out"),
        ('def _f():\n    """Nobody needs this."""\n', "'Nobody needs this.': name the thing"),
        ("a = 1\n" * 401, "402 lines: split the file, 400 are the most"),
    ],
)
def test_what_is_complained_about(tmp_path, source, expected):
    assert complaints(tmp_path, source) == [expected]


def test_a_checkout_may_be_called_as_a_package_is(tmp_path, monkeypatch):
    monkeypatch.setattr(lint, "REPOSITORY", tmp_path / "fastreg")
    assert complaints(tmp_path / "fastreg", "def f(): pass\n", "tests", head="") == []


@pytest.mark.parametrize(
    "source",
    [
        'def f(x):\n    """Returns the sum of all numbers."""\n    return x.found\n',
        'class A:\n    """A sum that grows with every number."""\n',
        'class A:\n    @property\n    def f(self):\n        """The sum of all the numbers."""\n',
        "from hypothesis import given\n\n\n@given()\ndef f(): pass\n",
        "class EMA:\n    def __init__(self, every: int):\n        self.every = every\n",
        f"class SGD:\n    def __init__(self, {MANY}): pass\n",
        f"@triton.jit\ndef kernel({MANY}): pass\n",
        "def _f():\n    def g(): pass\n",
    ],
)
def test_what_is_right(tmp_path, source):
    assert complaints(tmp_path, source) == []


def test_tests_need_no_sentences(tmp_path):
    assert complaints(tmp_path, 'def f():\n    """Adds."""\n', package="tests", head="") == []
    assert complaints(tmp_path, "told = 1\n", package="tests", head="") != []


def test_a_module_says_what_it_does(tmp_path):
    assert complaints(tmp_path, "a = 1\n", head="") == ["the module has no docstring"]


def test_it_fails_where_it_complains(tmp_path, capsys):
    complaints(tmp_path, "found = 1\n")
    assert lint.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.endswith("1 complaints\n")
    complaints(tmp_path, "total = 1\n")
    assert lint.main([str(tmp_path)]) == 0
