"""What the command line says to help, and to input that it cannot use."""

import subprocess
import sys

import pytest

from fastreg.cli import main
from fastreg.cli.compare import choice, contenders
from fastreg.cli.usage import UsageError


def test_without_a_command_it_prints_help(capsys):
    assert main([]) == 0
    assert "compare" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, expected", [(["--version"], "fastreg "), (["compare", "--help"], "noise")]
)
def test_help_and_version_exit_with_success(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert expected in capsys.readouterr().out


def test_list_names_every_contender(capsys):
    assert main(["compare", "--list"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == NAMES
    assert "{}" not in out


def test_the_command_line_imports_no_transformers():
    code = "import sys, fastreg.cli; assert not {'transformers', 'matplotlib', 'rich'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


NAMES = [*contenders.ENTRIES, *contenders.ALIASES]
WRONG = [
    (["mpare"], "'mpare'"),
    (["compare", "--what"], "--what"),
    (["compare", "--steps", "0"], "whole number >= 1, got '0'"),
    (["compare", "--steps", "many"], "'many'"),
    (["compare", "--lr", "-1"], "number > 0, got '-1'"),
    (["compare", "--lr", "nan"], "number > 0, got 'nan'"),
    (["compare", "--weight-decay", "inf"], "number >= 0, got 'inf'"),
    (["compare", "--seed", "-3"], "whole number >= 0, got '-3'"),
    (["compare", "--block-size", "1"], "--block-size must be >= 2, got 1"),
    (
        ["compare", "--with", "plain,sham"],
        f"unknown contender 'sham'; choose from {', '.join(NAMES)}",
    ),
    (["compare", "--with", ","], "names no contender"),
    (["compare", "--with", "ema,ema"], "'ema' twice"),
    (["compare", "--with", "clip+"], "unknown contender ''"),
    (["compare", "--with", "ema=much"], "'ema=much' is not a number; for example ema=0.98"),
    (["compare", "--with", "plain=3"], "'plain' takes no strength"),
    (["compare", "--seeds", "0"], "whole number >= 1, got '0'"),
    (["compare", "--recipe", "no/such.yaml"], "--recipe no/such.yaml: No such file"),
    (
        ["compare", "--resume", "no/such"],
        "--resume no/such: holds no interrupted run (there is no resume.pt)",
    ),
    (["bench", "--suite", "rules,speed"], "unknown suite 'speed'; choose from rules, regularizers"),
    (["bench", "--suite", ","], "names no suite"),
    (["bench", "--device", "gpu:x"], "--device gpu:x: "),
    (["bench", "--out", "/dev/null/x"], "--out /dev/null/x: Not a directory"),
]


@pytest.mark.parametrize(
    "arguments, expected", WRONG, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_wrong_arguments_give_one_line_and_exit_code_2(arguments, expected, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert printed.err.startswith("fastreg: error: ") and expected in printed.err


WRONG_LATER = [
    (["--text", "no/such/file.txt"], "no/such/file.txt: No such file"),
    (["--text", "{folder}"], "Is a directory"),
    (["--text", "{binary}"], "not UTF-8"),
    (["--text", "{short}"], "training share has 18 of the text's 20 tokens, too few for --block-size 64"),
    (["--text", "{empty}"], "has 0 of the text's 0 tokens"),
    (["--train-tokens", "10000000"], "lower --train-tokens"),
    (["--model", "{folder}"], "expected a causal language model"),
    (["--model", "{folder}/missing"], "expected a causal language model"),
    (["--device", "abacus"], "--device abacus"),
    (["--device", "meta"], "--device meta"),
    (["--out", "{short}"], "File exists"),
    (["--out", "{short}/below"], "Not a directory"),
    (["--with", "ema=1.5"], "decay must be in [0, 1)"),
    (["--with", "clip=0"], "max_norm must be > 0"),
    (["--with", "l1=nan"], "strength must be finite and >= 0, got strength=nan"),
    (["--with", "decay=-1"], "weight_decay"),
    (["--with", "clip+clip=2"], "clip.max_norm is given more than once, as 1.0 and 2.0"),
    (["--with", "torch+noise"], "compared as it is, got gradient_noise"),
    (["--recipe", "{unknown}"], "{unknown}: a recipe has no field 'clp'; did you mean 'clip'?"),
    (["--recipe", "{range}"], "{range}: clip: max_norm must be > 0, got max_norm=-1.0"),
    (["--recipe", "{noyaml}"], "{noyaml}: while scanning"),
    (["--recipe", "{list}"], "{list}: a recipe is a mapping"),
    (["--recipe", "{binary}"], "binary: 'utf-8' codec can't decode"),
    (["--recipe", "{role}"], "--recipe role: dropout: GPT2LMHeadModel has no 'adapter' dropout"),
    (["--recipe", "{good}", "{good}"], "{good}: there is another contender 'good'"),
    (["--recipe", "{plain}"], "there is another contender 'plain'"),
    (["--with", "torch+amsgrad"], "compared as it is, got optimizer"),
]


@pytest.mark.parametrize(
    "arguments, expected", WRONG_LATER, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_wrong_input_gives_one_line_before_anything_is_trained(
    arguments, expected, tmp_path, capsys, monkeypatch
):
    for module in ("matplotlib", "rich", "transformers"):
        pytest.importorskip(module)
    recipes = {
        "unknown": "clp: 1", "range": "clip: -1", "noyaml": "clip: 'x", "list": "[clip]", "good": "clip: 1",
        "role": "dropout: {roles: adapter}", "plain": "ema: true",
    }  # fmt: skip
    files = {name: tmp_path / name for name in ("folder", "binary", "short", "empty", *recipes)}
    for name, text in recipes.items():
        files[name].write_text(text, encoding="utf-8")
    files["folder"].mkdir()
    files["binary"].write_bytes(b"\xff\xfe\x00")
    files["short"].write_text("twenty bytes of text", encoding="utf-8")
    files["empty"].touch()
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *(argument.format(**files) for argument in arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert printed.err.startswith("fastreg: error: ") and expected.format(**files) in printed.err
    assert not (tmp_path / "runs").exists()


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr("fastreg.cli.usage.find_spec", lambda name: None)
    assert main(["compare"]) == 2
    assert "needs matplotlib, rich, transformers: pip install 'fastreg[cli]'" in capsys.readouterr().err
    assert main(["bench"]) == 2
    assert "needs matplotlib, rich: pip install 'fastreg[bench]'" in capsys.readouterr().err


def test_combinations_expand_to_entries():
    (combined,) = choice.parse("all+torch")
    assert [entry.name for entry, _ in combined.parts] == ["clip", "noise", "ema", "decay", "torch"]
    single, other = choice.parse(" ema = 0.5 , clip ")
    assert (single.label, single.parts[0][1], other.parts[0][1]) == ("ema = 0.5", 0.5, 1.0)
    with pytest.raises(UsageError, match="unknown"):
        choice.parse("all,none")


def test_a_strength_is_told_as_what_it_stands_for():
    summaries = {
        label: choice.parse(label)[0].summary for label in ("swa", "swa=0.5", "swa=1", "clip=0.5", "plain")
    }
    assert summaries["swa"].endswith("from 0.3 of the run on")
    assert summaries["swa=0.5"].endswith("from 0.5 of the run on")
    assert summaries["swa=1"].endswith("from step 1 on")
    assert summaries["clip=0.5"].endswith("clipped to 0.5")
    assert summaries["plain"] == contenders.ENTRIES["plain"].summary
