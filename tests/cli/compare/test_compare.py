"""`fastreg compare` from end to end, with a few steps of training."""

import json
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

import torch  # noqa: E402

import fastreg  # noqa: E402
from fastreg.cli import main  # noqa: E402
from fastreg.cli.compare import choice, contenders, runner  # noqa: E402
from fastreg.cli.compare.setup import Setup  # noqa: E402
from fastreg.recipe.callbacks import Callback  # noqa: E402
from fastreg.training.evaluation import evaluate_with_averages  # noqa: E402

FEW = ["--steps", "4", "--eval-every", "2", "--batch-size", "2", "--block-size", "16"]
SMALL = [*FEW, "--train-tokens", "160", "--val-tokens", "160"]
PNG = b"\x89PNG\r\n\x1a\n"


def compare(out, *arguments):
    code = main(["compare", *SMALL, "--device", "cpu", "--out", str(out), *arguments])
    return code, json.loads((out / "compare.json").read_text())


def losses(results):
    return {contender["label"]: contender["curves"] for contender in results["contenders"]}


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    out = tmp_path_factory.mktemp("everything")
    code, results = compare(out)
    return code, results, out


def test_default_contenders_leave_a_table_of_each_and_a_picture(everything):
    code, results, out = everything
    assert code == 0
    assert [c["label"] for c in results["contenders"]] == contenders.DEFAULT.split(",")
    assert results["baseline"] == "plain" and not results["interrupted"]
    assert results["config"]["steps"] == 4 and results["seed"] == 0
    assert results["versions"]["torch"] == version("torch")
    for contender in results["contenders"]:
        assert contender["finished"]
        assert contender["curves"]["step"] == [0, 2, 4]
        assert contender["validation_loss"] == contender["curves"]["validation"][-1]
        assert contender["best_validation_loss"] == min(contender["curves"]["validation"])
        assert contender["gap"] == contender["validation_loss"] - contender["train_loss"]
        assert 0 < contender["optimizer_time"] < contender["step_time"]
        assert contender["peak_memory"] > 2**20
    assert set(results["verdicts"]) == {c["label"] for c in results["contenders"]} - {"plain"}
    picture = (out / "compare.png").read_bytes()
    assert picture.startswith(PNG) and len(picture) > 20_000


def test_contenders_share_weights_and_batches_but_not_the_regularizer(everything):
    curves = losses(everything[1])
    starts = {name: (curve["train"][0], curve["validation"][0]) for name, curve in curves.items()}
    assert len(set(starts.values())) == 1
    assert curves["torch"]["train"] == pytest.approx(curves["plain"]["train"], rel=1e-5)
    for name in ("clip", "noise", "ema", "decay", "all"):
        assert curves[name]["train"][-1] != pytest.approx(curves["plain"]["train"][-1], rel=1e-6), name


def test_same_seed_same_losses_whatever_ran_before(everything, tmp_path):
    _, again = compare(tmp_path / "again", "--with", "all,noise")
    _, other = compare(tmp_path / "other", "--with", "noise", "--seed", "1")
    curves = losses(everything[1])
    assert losses(again) == {"all": curves["all"], "noise": curves["noise"]}
    assert losses(other)["noise"] != curves["noise"]


def test_ema_is_evaluated_with_the_average(tmp_path):
    # A decay of zero keeps only the newest weights; one close to 1 keeps those of the beginning.
    _, results = compare(tmp_path, "--with", "plain,ema=0,ema=0.999999")
    curves = losses(results)
    assert curves["ema=0"] == curves["plain"]
    first, *_, last = curves["ema=0.999999"]["validation"]
    assert last == pytest.approx(first, rel=1e-4)
    assert curves["plain"]["validation"][-1] < first - 0.01


def test_averages_are_what_is_evaluated(tmp_path):
    """The mean lags behind; before it starts, and of the last step alone, it is the weights."""
    _, results = compare(
        tmp_path, "--with", "plain,swa=1,swa=4,swa=9,lookahead=1,lookahead=9,lookahead=4+ema=0"
    )
    curves = losses(results)
    assert curves["swa=4"] == curves["swa=9"] == curves["plain"]
    assert curves["swa=1"]["validation"][-1] > curves["plain"]["validation"][-1]
    start = curves["plain"]["validation"][0]
    assert curves["lookahead=9"]["validation"] == [start] * 3, "slow weights wait for the ninth step"
    assert start > curves["lookahead=1"]["validation"][-1] > curves["plain"]["validation"][-1]
    assert curves["lookahead=4+ema=0"]["validation"][1] == curves["plain"]["validation"][1], (
        "the average first"
    )


def test_sharpness_aware_contenders(tmp_path, monkeypatch):
    """A radius of 0 changes nothing, another does; the optimizer is timed in both of its steps."""
    names = "plain,sam=0,sam=0.5,asam=0,asam=2,msam=0,msam=3,sam=0+ema=0,clip=1e9+msam=0"
    _, results = compare(tmp_path, "--with", names)
    curves = losses(results)
    for name in curves:
        same = curves[name]["validation"][-1] == pytest.approx(curves["plain"]["validation"][-1], rel=1e-6)
        assert same == (not {"sam=0.5", "asam=2", "msam=3"} & {name}), name


@pytest.mark.parametrize("label", ["torch+sam", "asam+torch", "torch+msam", "torch+lookahead"])
def test_torch_is_compared_as_it_is(label):
    setup = Setup(torch.nn.Linear(3, 1), lr=0.1, weight_decay=0.0, seed=0, steps=10)
    choice.parse(label)[0].apply(setup)
    with pytest.raises(ValueError, match="as it is, got (sam|msam|lookahead);"):
        setup.make()


def made(label, **options):
    """A run of a contender with a linear model."""
    settings = {
        "lr": 0.1,
        "weight_decay": 0.0,
        "steps": 10,
        "warmup": 0,
        "batch_size": 2,
        "device": torch.device("cpu"),
    } | options
    task = SimpleNamespace(
        build_model=lambda seed: torch.nn.Linear(3, 1), train=torch.zeros(32), block_size=8
    )
    return runner.Run(choice.parse(label)[0], task, SimpleNamespace(**settings), 0)


def test_msam_is_evaluated_at_the_weights_themselves():
    run = made("msam=5")
    model, optimizer = run.model, run.optimizer
    plain = torch.nn.Linear(3, 1)
    plain.load_state_dict(model.state_dict())
    other = fastreg.AdamW(plain.parameters(), lr=0.1, weight_decay=0.0)
    for parameter in (*model.parameters(), *plain.parameters()):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    other.step()
    assert not torch.allclose(model.weight, plain.weight, atol=0.1)
    with evaluate_with_averages(optimizer):
        torch.testing.assert_close(model.weight, plain.weight)


def test_every_contender_has_a_colour_of_its_own():
    from fastreg.cli.compare import figure

    labels = [*contenders.DEFAULT.split(","), "swa", "lookahead", "sam", "asam", "msam"]
    assert len({colour for colour, _ in figure._styles(labels)}) == len(labels)
    assert len({colour for colour, _ in figure._styles(["plain", "all", "sam=1", "sam=2", "clip+msam"])}) == 5
    labels = [*contenders.ENTRIES, "all", *(f"recipe {i}" for i in range(8))]
    assert len(set(figure._styles(labels))) == len(labels)


def test_strengths_and_combinations_reach_the_optimizer():
    optimizer = made("clip=0.5+noise=1e-3+decay=0.25+value=2", lr=0.01).optimizer
    components = {type(component).__name__: component for component in optimizer.components}
    assert components["ClipNorm"].max_norm == 0.5 and components["ClipValue"].clip_value == 2
    assert components["GradientNoise"].std == 1e-3
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.25 and group["lr"] == 0.01


@pytest.mark.parametrize(
    ("label", "kind"), [("lion", fastreg.Lion), ("sgd", fastreg.SGD), ("adam+ema", fastreg.Adam)]
)
def test_optimizers_are_contenders(label, kind):
    optimizer = made(label).optimizer
    assert type(optimizer) is kind and optimizer.param_groups[0]["lr"] == 0.1


def test_strengths_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="sam.rho is given more than once, as 0.1 and 0.5"):
        made("sam=0.1+asam")


class Stop(Callback):
    """Presses Ctrl-C in some step."""

    name = "stop"

    def __init__(self, at):
        self.left = at

    def make_passes(self, gradients, watch):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return gradients()


def entry(monkeypatch, name, change):
    """A contender that changes what the others make."""

    def apply(setup, strength):
        make = setup.make

        def changed():
            optimizer, callbacks = make()
            change(setup, callbacks)
            return optimizer, callbacks

        setup.make = changed

    monkeypatch.setitem(contenders.ENTRIES, name, contenders.Entry(name, "for a test", edit=apply))


def test_a_contender_may_change_model_and_training_step(monkeypatch, tmp_path):
    steps = []

    class Counting(Callback):
        def evaluate(self, loss):
            value = loss()
            steps.append(value.item())
            return value

    def change(setup, callbacks):
        setup.model.transformer.drop.p = 0.5
        callbacks.append(Counting())

    entry(monkeypatch, "changed", change)
    _, results = compare(tmp_path, "--with", "plain,changed")
    curves = losses(results)
    assert len(steps) == 4
    assert curves["changed"] != curves["plain"]
    assert results["contenders"][1]["summary"] == "for a test"


def test_ctrl_c_keeps_what_is_done(monkeypatch, tmp_path, capsys):
    entry(monkeypatch, "stop", lambda setup, callbacks: callbacks.append(Stop(4)))
    code, results = compare(tmp_path, "--with", "plain,stop,ema")
    assert code == 130 and results["interrupted"]
    plain, stop = results["contenders"]
    assert plain["finished"] and plain["curves"]["step"] == [0, 2, 4]
    assert not stop["finished"] and stop["curves"]["step"] == [0, 2]
    assert results["verdicts"]["stop"]["outcome"] == "stopped"
    assert (tmp_path / "compare.png").read_bytes().startswith(PNG)
    printed = capsys.readouterr().out
    assert "* stopped, losses of step 2" in printed
    assert f"fastreg compare --resume {tmp_path} goes on" in printed


def test_ctrl_c_before_the_first_evaluation_writes_an_empty_result(monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "mean_loss", interrupt)
    code, results = compare(tmp_path, "--with", "clip,plain")
    assert code == 130 and results["contenders"] == []


def test_a_run_that_diverges_ends_early_and_says_so(tmp_path):
    code, results = compare(tmp_path, "--with", "plain,noise=3e38", "--steps", "40", "--lr", "1e30")
    noise = results["contenders"][1]
    assert code == 0 and noise["validation_loss"] is None and noise["curves"]["step"][-1] < 40
    assert results["verdicts"]["noise=3e38"]["outcome"] == "diverged"


def test_text_files_are_split_in_order(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("a" * 399, encoding="utf-8")
    two.write_text("é" * 300, encoding="utf-8")
    arguments = ["compare", *FEW, "--with", "plain", "--out", str(tmp_path), "--text", str(one), str(two)]
    assert main(arguments) == 0
    results = json.loads((tmp_path / "compare.json").read_text())
    assert results["text"] == {"name": f"{one}, {two}", "train_tokens": 900, "validation_tokens": 96}


def test_final_losses_take_all_windows_and_curves_a_sample(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "CURVE_WINDOWS", 3)
    _, results = compare(tmp_path, "--with", "plain")
    _, whole = compare(tmp_path, "--with", "plain", "--eval-every", "4")
    monkeypatch.undo()
    _, full = compare(tmp_path, "--with", "plain")
    sampled, exact = results["contenders"][0], full["contenders"][0]
    assert sampled["curves"]["validation"] != exact["curves"]["validation"]
    assert sampled["validation_loss"] == exact["validation_loss"] == whole["contenders"][0]["validation_loss"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A text and a tokenizer that knows its words."""
    text = "the quick brown fox jumps over the lazy dog and runs away from it all . " * 40
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["[UNK]", *text.split()]))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("words") / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path, transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=32, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None
    ),
    "llama": lambda: transformers.LlamaConfig(
        vocab_size=32, max_position_embeddings=32, hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, bos_token_id=None, eos_token_id=None,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, words, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()
    model.save_pretrained(folder)
    words[1].save_pretrained(folder)
    return folder, model


def test_pretrained_models_start_from_their_weights(checkpoint, words, tmp_path):
    folder, model = checkpoint
    text, tokenizer = words
    arguments = [*FEW, "--model", str(folder), "--text", str(text), "--with", "plain,all", "--lr", "0.01"]
    assert main(["compare", *arguments, "--device", "cpu", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "compare.json").read_text())
    tokens = tokenizer(text.read_text(), return_tensors="pt").input_ids[0]
    share = len(tokens) * 9 // 10
    assert results["text"]["train_tokens"] == share
    windows = tokens[: share // 16 * 16].view(-1, 16)
    with torch.no_grad():
        expected = model.eval()(input_ids=windows, labels=windows).loss.item()
    assert losses(results)["plain"]["train"][0] == pytest.approx(expected, rel=1e-5)
    assert losses(results)["plain"]["train"][-1] < expected


def test_too_long_windows_for_a_model_are_refused(checkpoint, words, capsys):
    arguments = ["--model", str(checkpoint[0]), "--text", str(words[0]), "--block-size", "33"]
    assert main(["compare", *arguments]) == 2
    assert "exceeds the 32 positions" in capsys.readouterr().err


def test_a_checkpoint_of_another_kind_is_refused(words, tmp_path, capsys):
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    words[1].save_pretrained(tmp_path)
    assert main(["compare", "--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "the checkpoint is no causal language model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_process_prints_one_line_and_no_traceback(tmp_path):
    command = [
        sys.executable,
        "-m",
        "fastreg.cli",
        "compare",
        "--model",
        str(tmp_path),
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and str(tmp_path) in done.stderr


def test_dropout_of_every_kind(tmp_path):
    """Each changes the run, rates of 0 change nothing, and evaluation drops nothing."""
    names = "plain,dropout=0.5,layerwise=0.5,annealed=0.5,adadrop=0.4,droppath=0.5,dropout=0,droppath=0"
    _, results = compare(tmp_path, "--with", names)
    curves = losses(results)
    starts = [curve["validation"][0] for curve in curves.values()]
    assert starts == [starts[0]] * len(curves)
    for name, curve in curves.items():
        same = curve["validation"][-1] == pytest.approx(curves["plain"]["validation"][-1], rel=1e-6)
        assert same == (name in ("plain", "dropout=0", "droppath=0")), name
    ends = [curve["validation"][-1] for name, curve in curves.items() if not name.endswith("=0")]
    assert len(set(ends)) == 6


def test_annealing_ends_where_it_should():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=8))
    setup = Setup(model, lr=0.1, weight_decay=0.0, seed=0, steps=4)
    choice.parse("annealed=0.4")[0].apply(setup)
    _, callbacks = setup.make()
    rates = [model.transformer.h[1].mlp.dropout.p]
    for _ in range(4):
        callbacks.step()
        rates.append(model.transformer.h[1].mlp.dropout.p)
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])


def test_noise_adversarial_passes_and_r_drop(tmp_path):
    """Each changes the run, and without strength nothing."""
    names = "neftune,tokennoise=0.3,actnoise,weightnoise,fgm"
    zeros = "neftune=0,tokennoise=0,actnoise=0,weightnoise=0"
    _, results = compare(tmp_path, "--with", f"plain,{names},{zeros},dropout,rdrop")
    curves = losses(results)
    assert len({curve["validation"][0] for curve in curves.values()}) == 1
    ends = {name: curve["validation"][-1] for name, curve in curves.items()}
    for name in names.split(","):
        assert ends[name] != pytest.approx(ends["plain"], rel=1e-6), name
    for name in zeros.split(","):
        assert ends[name] == ends["plain"], name
    assert ends["rdrop"] != pytest.approx(ends["dropout"], rel=1e-6)
