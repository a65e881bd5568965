"""The suites: what is wrong prints no number, what cannot run says why, and numbers are what they claim."""

import json
import math
from importlib.metadata import version

import pytest
import torch

import fastreg
from fastreg.cli import main
from fastreg.engine.grad_norm import GradNorm
from fastreg.optim import perturb
from fastreg.optim.decay import Shrinkage
from fastreg.optim.model_average import UpdateAverages
from fastreg.optim.rules import Adam
from fastreg_benchmarks import (
    SUITES,
    adversarial,
    averages,
    figure,
    measure,
    norm,
    peers,
    report,
    sam,
    steps,
    suite,
)
from fastreg_benchmarks.host import HostCase, PerTensorCase
from fastreg_benchmarks.training import TrainingCase

pytestmark = pytest.mark.filterwarnings(
    "ignore:Parameter `foreach` is deprecated:DeprecationWarning"
)  # optimi's

CPU = torch.device("cpu")
SIZES = [(33, 65), (7,), (300,), (1,)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(measure, "COPIED", 2**16)
    with fastreg.use_backend("reference"):
        yield


def case(chain="clip+AdamW+EMA", storage="fp32", sizes=SIZES):
    return steps.StepCase("regularizers", chain, "toy", sizes, storage, rounds=3)


def rows(some_case):
    return suite.measured(some_case, CPU)[0]["rows"]


RIGHT = [
    (chain, storage)
    for chain in ("AdamW", "SGD-momentum", "Lion", "clip+AdamW", "clip+AdamW+EMA")
    for storage in ("fp32", "bf16")
    if (chain, storage) != ("SGD-momentum", "bf16")  # torch's own fused step is wrong there, on a CPU
]


@pytest.mark.parametrize("chain, storage", RIGHT)
def test_a_right_result_has_numbers(chain, storage):
    result, timings = suite.measured(case(chain, storage), CPU)
    ours = result["rows"]["fastreg"]
    assert "wrong" not in ours and ours["ms"]["median"] > 0 and len(timings["fastreg"].seconds) == 3
    theirs = result["rows"][result["baseline"]]
    assert theirs["ratio"]["median"] == 1
    assert math.isclose(ours["ratio"]["median"], theirs["ms"]["median"] / ours["ms"]["median"])
    assert math.isclose(ours["gbps"], result["bytes"] / ours["ms"]["median"] / 1e6)


def no_decay(monkeypatch):
    step_scalars = Shrinkage.step_scalars
    monkeypatch.setattr(
        Shrinkage,
        "step_scalars",
        lambda self, group, step: step_scalars(self, {**group, "weight_decay": 0.0}, step),
    )


def stale_step(monkeypatch):
    step_scalars = Adam.step_scalars
    monkeypatch.setattr(Adam, "step_scalars", lambda self, group, step: step_scalars(self, group, 1))


def show(result, capsys):
    from rich.console import Console

    report.show(Console(width=120), result)
    return capsys.readouterr().out


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", [no_decay, stale_step], ids=lambda f: f.__name__)
def test_a_wrong_kernel_prints_no_number(fault, storage, monkeypatch, capsys):
    fault(monkeypatch)
    result, timings = suite.measured(case("AdamW", storage), CPU)
    row = result["rows"]["fastreg"]
    assert "weights off by" in row["wrong"] and not row.keys() & {"ms", "ratio", "gbps"}
    assert "fastreg" not in timings and suite.refused([result])
    (line,) = [line for line in show(result, capsys).splitlines() if line.strip().startswith("fastreg")]
    assert line.split() == ["fastreg", "refused"]
    assert "ms" in result["rows"]["torch fused"], "the others are measured all the same"


def test_clipping_left_out_is_noticed(monkeypatch):
    monkeypatch.setattr(
        GradNorm, "prepare", lambda self, work: self._results.update({CPU: torch.ones(5).double()})
    )
    assert "weights off" in rows(case("clip+AdamW"))["fastreg"]["wrong"]


def test_a_wrong_average_is_noticed(monkeypatch):
    monkeypatch.setattr(fastreg.EMA, "weight", lambda self, updates: 0.5)
    assert "averages off" in rows(case("clip+AdamW+EMA"))["fastreg"]["wrong"]


@pytest.mark.parametrize("std", [0.0, 0.009])
def test_wrong_noise_is_noticed(std, monkeypatch):
    chain = "clip+noise+AdamW"
    assert "wrong" not in rows(case(chain, sizes=[(40000,)]))["fastreg"]
    monkeypatch.setattr(fastreg.GradientNoise, "step_scalars", lambda self, group, step: (std,))
    assert "noise off" in rows(case(chain, sizes=[(40000,)]))["fastreg"]["wrong"]


# SAM and averages ------------------------------------------------------------------------------------------


def sharpness(chain):
    if "MSAM" in chain:
        return sam.MsamCase("sam", chain, "toy", SIZES, rounds=3, part="MSAM")
    return sam.SamCase("sam", chain, "toy", SIZES, rounds=3)


def lookahead():
    return averages.LookaheadCase("averages", "AdamW+Lookahead", "toy", SIZES, rounds=3)


AVERAGED = averages.AveragedModelCase("toy", SIZES, 3)
BYTES = {
    "SAM+AdamW": 48, "SAM+SGD-momentum": 40, "ASAM+AdamW": 52, "MSAM+AdamW": 36, "MSAM+SGD-momentum": 32,
}  # fmt: skip


@pytest.mark.parametrize("chain", BYTES)
def test_every_sam_is_right(chain):
    case = sharpness(chain)
    assert case.bytes == BYTES[chain] * case.elements
    measured = rows(case)
    assert len(measured) == (2 if "MSAM" in chain else 4 if chain == "SAM+AdamW" else 3)
    assert all("ms" in row for row in measured.values()), measured


def test_averages_are_right():
    steps_of_lookahead = lookahead()
    assert steps_of_lookahead.bytes == (5 * 28 + 8) * steps_of_lookahead.elements
    assert AVERAGED.bytes == 12 * steps_of_lookahead.elements
    for some_case in (steps_of_lookahead, AVERAGED, case("AdamW+EMA")):
        results = {name: row for name, row in rows(some_case).items() if "skipped" not in row}
        assert results["fastreg"]["ratio"] and all("ms" in row for row in results.values()), results


def no_perturbation(monkeypatch):
    monkeypatch.setattr(perturb._Ascend, "step_scalars", lambda self, group, step: (0.0,))


def gradients_of_both(monkeypatch):
    monkeypatch.setattr(perturb._Ascend, "device_scalars", lambda self, device: (torch.tensor(1.0),))


def not_restored(monkeypatch):
    monkeypatch.setattr(fastreg.SAM, "fused_optimizer", None)
    monkeypatch.setattr(fastreg.SAM, "_step_fused", lambda self, base, *_: base.step())


@pytest.mark.parametrize(
    "fault, quantity",
    [
        (no_perturbation, "perturbed weights"),
        (gradients_of_both, "perturbed weights"),
        (not_restored, "weights"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_wrong_sam_is_noticed(fault, quantity, monkeypatch):
    fault(monkeypatch)
    results = rows(sharpness("SAM+AdamW"))
    assert results["fastreg"]["wrong"].startswith(f"{quantity} off by")
    assert "ms" in results["davda54 + torch fused"]


def test_a_wrong_msam_is_noticed(monkeypatch):
    monkeypatch.setattr(
        fastreg.MSAM, "prev_perturbation", lambda self, device: self.device_scalars(device)[0]
    )
    assert "weights off" in rows(sharpness("MSAM+AdamW"))["fastreg"]["wrong"]


def test_a_wrong_lookahead_is_noticed(monkeypatch):
    monkeypatch.setattr(fastreg.SlowWeights, "step_scalars", lambda self, group, step: (0.4, 1.0))
    results = rows(lookahead())
    assert "weights off" in results["fastreg"]["wrong"]
    assert "ms" in results["fastreg without Lookahead"]


def test_a_wrong_averaged_model_is_noticed(monkeypatch):
    run = UpdateAverages.run
    monkeypatch.setattr(
        UpdateAverages, "run", lambda self, ws, weight, *seed: run(self, ws, weight / 2, *seed)
    )
    assert "averages off" in rows(AVERAGED)["fastreg"]["wrong"]


def test_a_peer_that_moves_its_weights_leaves_those_of_others():
    """Addresses that change under a contender would be looked for again in the time of its step."""
    some_case = sharpness("SAM+AdamW")
    workload = some_case.setup(CPU)
    runs = {name: build(workload) for name, build in some_case.contenders().items()}
    for run in runs.values():
        run()
    places = [p.data_ptr() for p in runs["fastreg"].params]
    runs["davda54"]()
    assert [p.data_ptr() for p in runs["fastreg"].params] == places
    assert not set(places) & {p.data_ptr() for p in runs["davda54"].params}


def test_a_result_that_is_no_number_is_wrong():
    assert suite.Check("weights", math.nan, 1.0).wrong and not suite.Check("weights", 1.0, 1.0).wrong


def test_a_peer_that_fails_is_refused_alone(monkeypatch):
    def fails(chain, params, max_norm):
        return peers.Step(lambda: params.missing, torch.optim.SGD(params))

    monkeypatch.setattr(peers, "foreach", fails)
    results = rows(case("AdamW"))
    assert "AttributeError" in results["torch foreach"]["wrong"] and "ms" in results["fastreg"]


def test_what_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optimi", None)
    results = rows(case("AdamW"))
    assert "pip install 'fastreg[bench]'" in results["optimi"]["skipped"]
    assert results["flashoptim"]["skipped"] == "flashoptim needs CUDA"


def test_what_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(measure, "free_memory", lambda device: 1000)
    result, timings = suite.measured(case(), CPU)
    assert "GiB of memory" in result["skipped"] and not result["rows"] and not timings
    assert any("left out: needs" in note for note in report.notes([result]))


def test_contenders_take_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = measure.interleave(runs, 4, measure.Clock(CPU), warmup=1)
    turns = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert turns == ["cab", "abc", "bca", "cab", "abc"]
    assert all(len(timing.seconds) == 4 for timing in timings.values())


def test_the_norm_is_verified(monkeypatch):
    sound = norm.NormCase("toy", SIZES, "bf16", 3)
    assert "ms" in rows(sound)["fastreg"]
    monkeypatch.setattr(norm._Ours, "__call__", lambda self: torch.tensor(1.0))
    assert "norm off" in rows(sound)["fastreg"]["wrong"]


@pytest.mark.parametrize("count", [148, 1000])
def test_the_host_spends_no_more_than_torch(count):
    results = rows(HostCase(count, 200))
    assert results["fastreg"]["errors"] == {"step count": 0, "launches": 0}
    assert results["fastreg"]["ratio"]["median"] >= 1


def test_what_a_tensor_costs_on_the_cpu():
    results = rows(PerTensorCase(20, 3))
    assert results["fastreg"]["tensors"] == 20 and results["fastreg"]["ms"]["median"] > 0


@pytest.mark.slow
def test_training_step_and_the_optimizers_share():
    result, _ = suite.measured(TrainingCase("toy", 1, 64, 1, 8, 2), CPU)
    assert len(result["rows"]) == 8
    for row in result["rows"].values():
        assert 0 < row["optimizer_ms"]["median"] < row["ms"]["median"]


def test_a_training_step_is_not_compared_with_itself():
    toy = TrainingCase("toy", 1, 64, 1, 8, 2)
    workload = toy.setup(CPU)
    run = toy.contenders()["fastreg AdamW"](workload)
    with pytest.raises(suite.Unavailable, match="torch AdamW failed"):
        toy.verify("fastreg AdamW", workload, run)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_cases_have_names_of_their_own(name, quick):
    device = torch.device(name)
    names = [c.name for module in SUITES for c in suite.cases(module, device, quick)]
    assert len(names) == len(set(names)) and "AdamW, GPT-2 124M, fp32" in names or (quick and name == "cpu")


@pytest.mark.parametrize("attack, storage", [("PGD", "fp32"), ("FGSM", "fp32"), ("FGSM", "bf16")])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_of_attacks(attack, norm, storage, monkeypatch):
    some = adversarial.AttackCase(attack, norm, 1, storage, 1)
    workload = some.setup(CPU)
    for name in ("fastreg", "torch"):
        assert not any(
            check.wrong for check in some.verify(name, workload, some.contenders()[name](workload))
        )
    wrong = some.verify("fastreg", workload, lambda: workload.point)
    assert any(check.wrong for check in wrong)


# The command -----------------------------------------------------------------------------------------------


@pytest.fixture
def one_case(monkeypatch):
    monkeypatch.setattr(suite, "cases", lambda name, device, quick: [case("AdamW")])


def test_bench_writes_table_picture_and_json(one_case, tmp_path, capsys):
    assert main(["bench", "--quick", "--suite", "rules", "--device", "cpu", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "torch fused" in out and "flashoptim left out: flashoptim needs CUDA" in out
    run = json.loads((tmp_path / "bench.json").read_text())
    assert run["quick"] and run["machine"]["versions"]["torch"] == version("torch")
    assert run["results"][0]["rows"]["fastreg"]["ms"]["median"] > 0
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_bench_fails_if_ours_is_wrong(one_case, tmp_path, monkeypatch, capsys):
    no_decay(monkeypatch)
    assert main(["bench", "--suite", "rules", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "fastreg refused: weights off by" in capsys.readouterr().out


def test_ctrl_c_keeps_what_is_done(tmp_path, monkeypatch):
    class Interrupted(suite.Case):
        suite = name = "interrupted"
        verify = contenders = None

        def setup(self, device):
            raise KeyboardInterrupt

    monkeypatch.setattr(Interrupted, "__abstractmethods__", frozenset())
    monkeypatch.setattr(suite, "cases", lambda *_: [case("AdamW"), Interrupted()])
    Interrupted.baseline = ""
    assert main(["bench", "--suite", "rules", "--device", "cpu", "--out", str(tmp_path)]) == 130
    run = json.loads((tmp_path / "bench.json").read_text())
    assert run["interrupted"] and len(run["results"]) == 1


def test_nothing_to_draw_is_no_error(tmp_path):
    figure.draw(tmp_path / "empty.png", report.document(CPU, True))
    assert (tmp_path / "empty.png").exists()


@pytest.mark.parametrize(
    "value, text", [(1234.0, "1.23 s"), (56.78, "56.8 ms"), (0.05, "50.0 µs"), (0.00012, "0.12 µs")]
)
def test_durations_have_three_digits(value, text):
    assert report.duration(value) == text
