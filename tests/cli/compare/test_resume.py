"""`fastreg compare` with recipes and seeds, interrupted and resumed."""

import json
import math
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("transformers")
pytest.importorskip("yaml")

import torch  # noqa: E402

from fastreg.cli import main  # noqa: E402
from fastreg.cli.compare import choice, contenders, figure, resume, runner, text  # noqa: E402
from fastreg.cli.measure import PeakMemory, Stopwatch  # noqa: E402

SMALL = [
    "--steps", "6", "--eval-every", "2", "--batch-size", "2", "--block-size", "8", "--train-tokens", "80",
    "--val-tokens", "80", "--device", "cpu",
]  # fmt: skip
RECIPE = """
weight_decay: {rate: 1e-1, kind: cautious}
clip: {max_norm: 1, adaptive: 0.1}
gradient_noise: 1e-3
dropout: {layers: linear, base: 0.1, increase: 0.1, annealing: {schedule: linear, steps: 0.5}}
embedding_noise: {alpha: 5, annealing: {schedule: cosine}}
weight_noise: 0.01
sam: {rho: 0.1, interval: 2}
lookahead: 2
ema: 0.5
"""


@pytest.fixture(scope="module", autouse=True)
def quick():
    """A narrow model, no picture, and no search for garbage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "WIDTH", 16)
        patch.setattr(PeakMemory, "reset", lambda self: None)
        patch.setattr(figure, "draw", lambda path, *_: path.write_bytes(b""))
        yield


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def results(out):
    return json.loads((out / "compare.json").read_text())


def curves(contents):
    return {
        (c["label"], run["seed"]): (run["curves"], run["train_loss"], run["validation_loss"])
        for c in contents["contenders"]
        for run in c["runs"]
    }


def interrupt(monkeypatch, at):
    """Press Ctrl-C in some training step, counted over all runs."""
    step, count = runner.Run.step, iter(range(1, 1000))

    def stopping(self, batch, watch):
        if next(count) == at:
            raise KeyboardInterrupt
        step(self, batch, watch)

    monkeypatch.setattr(runner.Run, "step", stopping)


def test_training_is_not_lost_where_results_cannot_be_written(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(figure, "draw", full)
        with pytest.raises(OSError):
            main(["compare", *SMALL, "--with", "plain", "--out", str(tmp_path)])
        patch.setattr(runner.Run, "step", full)
        patch.setattr(figure, "draw", lambda *_: None)
        assert main(["compare", "--resume", str(tmp_path)]) == 0  # nothing is trained again
    assert results(tmp_path)["contenders"][0]["finished"]
    assert not (tmp_path / "resume.pt").exists()


def test_seeds_and_recipes_beside_contenders(recipe, tmp_path, capsys):
    arguments = ["--with", "plain,noise", "--recipe", str(recipe), "--seeds", "2", "--seed", "5"]
    assert main(["compare", *SMALL, *arguments, "--out", str(tmp_path / "out")]) == 0
    contents = results(tmp_path / "out")
    assert [c["label"] for c in contents["contenders"]] == ["plain", "noise", "mine"]
    assert "sam rho 0.1, interval 2" in contents["contenders"][2]["summary"]
    for contender in contents["contenders"]:
        one, two = contender["runs"]
        assert (one["seed"], two["seed"]) == (5, 6)
        assert one["curves"]["validation"][0] != two["curves"]["validation"][0], "weights differ"
        mean = [(a + b) / 2 for a, b in zip(one["curves"]["train"], two["curves"]["train"], strict=True)]
        assert contender["curves"]["train"] == pytest.approx(mean)
        a, b = one["validation_loss"], two["validation_loss"]
        assert contender["validation_loss"] == pytest.approx((a + b) / 2)
        assert contender["validation_loss_std"] == pytest.approx(abs(a - b) / math.sqrt(2))
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.strip().startswith("noise ") and "±" in line)
    assert row.count("±") == 2, row
    assert "means over seeds ± standard deviations" in printed and "seed 5 to 6" in printed
    assert main(["compare", *SMALL, "--with", "noise", "--seed", "6", "--out", str(tmp_path / "six")]) == 0
    assert curves(results(tmp_path / "six"))["noise", 6] == curves(contents)["noise", 6]


NAMES = "dropout+noise,sam+neftune,torch,annealed+ema,rdrop+msam,weightnoise+lookahead=2,adadrop+fgm"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What is compared with, trained in one go."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "mine.yaml").write_text(RECIPE, encoding="utf-8")
    arguments = ["--with", NAMES, "--recipe", str(folder / "mine.yaml")]
    assert main(["compare", *SMALL, *arguments, "--out", str(folder)]) == 0
    return folder, arguments


@pytest.mark.parametrize("run", range(8))
def test_a_resumed_run_gives_the_same_losses(run, whole, tmp_path, monkeypatch, capsys):
    """Interrupted in the step after the second evaluation, or in the one before the last."""
    folder, arguments = whole
    label = [*NAMES.split(","), "mine"][run]
    expected = curves(results(folder))[label, 0]
    chosen = ["--with", label] if run < 7 else ["--with", "torch", *arguments[2:]]
    with monkeypatch.context() as patch:
        interrupt(patch, 6 * (run == 7) + (6 if run % 2 else 3))
        assert main(["compare", *SMALL, *chosen, "--out", str(tmp_path)]) == 130
    assert curves(results(tmp_path))[label, 0] != expected
    assert main(["compare", "--resume", str(tmp_path)]) == 0
    contents = results(tmp_path)
    assert curves(contents)[label, 0] == expected
    assert contents["contenders"][-1]["finished"] and not contents["interrupted"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["compare.json", "compare.png"]


def test_what_is_finished_is_kept_and_only_the_rest_is_trained(tmp_path, monkeypatch):
    arguments = ["--with", "plain,noise,clip", "--seeds", "2"]
    assert main(["compare", *SMALL, *arguments, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, 6 * 4 + 2)  # the second run of noise, before its second evaluation
        assert main(["compare", *SMALL, *arguments, "--out", str(tmp_path / "x")]) == 130
    partly = results(tmp_path / "x")
    assert [len(c["runs"]) for c in partly["contenders"]] == [2, 2, 1]
    assert [c["finished"] for c in partly["contenders"]] == [True] * 3
    trained = []
    step = runner.Run.step
    monkeypatch.setattr(runner.Run, "step", lambda self, *a: (trained.append(1), step(self, *a))[1])
    assert main(["compare", "--resume", str(tmp_path / "x")]) == 0
    assert len(trained) == 12
    assert curves(results(tmp_path / "x")) == curves(results(tmp_path / "whole"))


@pytest.fixture
def stopped(recipe, tmp_path, monkeypatch):
    """A folder of a run that was interrupted, its text and its recipe."""
    words = tmp_path / "words.txt"
    words.write_text("some words to learn from. " * 20, encoding="utf-8")
    out = tmp_path / "stopped"
    arguments = ["--with", "plain", "--recipe", str(recipe), "--text", str(words), "--out", str(out)]
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert main(["compare", *SMALL, *arguments]) == 130
    return out, words, recipe


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(["compare", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_folder_of_another_run_is_refused(stopped, tmp_path, capsys):
    out, words, recipe = stopped
    kept = (out / resume.NAME).read_bytes()
    said = refused(capsys, "--resume", out, "--steps", "7")
    assert "that run has --steps 6, got --steps 7; leave --steps out" in said
    assert "has --with plain, got --with plain,ema" in refused(capsys, "--resume", out, "--with", "plain,ema")
    assert "--out goes without --resume" in refused(capsys, "--resume", out, "--out", tmp_path)
    recipe.write_text("clip: 1", encoding="utf-8")
    assert "a recipe is not what it was" in refused(capsys, "--resume", out)
    recipe.write_text(RECIPE, encoding="utf-8")
    words.write_text("other words to learn from " * 20, encoding="utf-8")
    assert "the text is not what it was" in refused(capsys, "--resume", out)
    words.write_text("some words to learn from. " * 20, encoding="utf-8")
    assert "holds an interrupted run; go on with it by --resume" in refused(capsys, *SMALL, "--out", out)
    assert (out / resume.NAME).read_bytes() == kept, "nothing is lost"
    assert main(["compare", "--resume", str(out), "--steps", "6"]) == 0, "the same arguments may be given"
    assert "holds no interrupted run" in refused(capsys, "--resume", out)


def test_a_damaged_file_is_told(stopped, capsys):
    out, *_ = stopped
    (out / resume.NAME).write_bytes(b"PK no more")
    assert f"--resume {out}: resume.pt cannot be read" in refused(capsys, "--resume", out)


def test_a_checkpoint_holds_no_code_and_is_replaced_at_once(stopped, monkeypatch):
    out, *_ = stopped
    kept = (out / resume.NAME).read_bytes()
    saved = torch.load(out / resume.NAME, weights_only=True)
    assert saved["records"][0]["steps"] == [0, 2] and "exp_avg" in saved["state"]["optimizer"]["state"][0]
    file = resume.RunFile.read(str(out))

    def fails(contents, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(KeyboardInterrupt):
        file.write()
    assert (out / resume.NAME).read_bytes() == kept
    assert not list(out.glob("*.new"))


def test_the_recipe_that_is_printed_can_be_compared(tmp_path, capsys):
    assert main(["recipe"]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    arguments = ["--with", "plain", "--recipe", str(path), "--out", str(tmp_path / "out")]
    assert main(["compare", *SMALL, *arguments]) == 0
    assert results(tmp_path / "out")["contenders"][1]["label"] == "printed"


def test_every_contender_has_a_default_that_works():
    """With a model that has dropout and embeddings, as `fastreg compare` trains it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=16, n_positions=8, bos_token_id=None, eos_token_id=None
    )
    task = SimpleNamespace(
        build_model=lambda seed: GPT2LMHeadModel(config), train=torch.zeros(32), block_size=8
    )
    args = SimpleNamespace(
        lr=0.01, weight_decay=0.01, steps=400, warmup=1, batch_size=2, device=torch.device("cpu")
    )
    for name in [*contenders.ENTRIES, *contenders.ALIASES]:
        run = runner.Run(choice.parse(name)[0], task, args, 0)
        run.model.train()
        tokens = torch.randint(16, (2, 8))
        before = [p.clone() for p in run.model.parameters()]
        run.step(tokens, Stopwatch(args.device))
        run.after_step()
        assert not all(map(torch.equal, before, run.model.parameters())), name
