"""`benchmarks/gpu.sh` and its stages, as far as they go without a GPU."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fastreg.launch_parameters import DEFAULTS, launch_parameters
from fastreg_benchmarks import counters, device_tests, families, gpu, pack, suite, tune
from fastreg_benchmarks.ledger import Ledger, failed
from fastreg_benchmarks.stub import stub_driver

ROOT = Path(__file__).resolve().parents[2]


def script(*arguments, out, **environment):
    settings = os.environ | {"OUT": str(out), "PYTHON": sys.executable} | environment
    settings.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", *arguments],
        env=settings,
        capture_output=True,
        text=True,
        timeout=500,
    )


def read(path):
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    out = tmp_path_factory.mktemp("dry")
    return script("--dry", out=out), out


@pytest.mark.slow
def test_every_stage_runs_without_a_gpu(dry):
    run, out = dry
    assert run.returncode == 0, run.stdout + run.stderr
    assert all(f"== {name}: ok after" in run.stdout for name in gpu.LIMITS)
    written = {f"{name}.json" for name in gpu.LIMITS} | {"bench.png", "log.txt"}
    assert {file.name for file in out.iterdir()} == written and len(written) <= 8
    for name in gpu.LIMITS:
        found = read(out / f"{name}.json")
        assert found["complete"] and found["machine"]["versions"]["torch"] == version("torch")
        if name != "bench":
            assert found["rows"] and not any(map(failed, found["rows"].values()))
    assert device_tests.counts(read(out / "tests.json")["rows"])["passed"] > 30
    assert read(out / "bench.json")["copy_gbps"] > 1


@pytest.mark.slow
def test_a_second_call_does_what_has_failed_and_what_is_missing(dry, tmp_path):
    _, out = dry
    smoke, tests, bench = (read(out / f"{name}.json") for name in ("smoke", "tests", "bench"))
    del smoke["rows"]["penalty fp32"]
    smoke["rows"]["dropout fp32"] = {"failed": "by hand"}
    missing = next(name for name, row in tests["rows"].items() if row["outcome"] == "passed")
    del tests["rows"][missing]
    gone = bench["results"].pop()
    for name, contents in (("smoke", smoke), ("tests", tests), ("bench", bench)):
        (tmp_path / f"{name}.json").write_text(json.dumps(contents))
    run = script("--dry", "smoke", "tests", "bench", out=tmp_path)
    assert run.returncode == 0, run.stdout
    told = [line.partition(":")[0] for line in run.stdout.splitlines()]
    assert {"dropout fp32", "penalty fp32"} == {
        name for name in told if name in smoke["rows"] or "penalty fp32" in name
    }
    assert "1 passed" in run.stdout
    assert [result["case"] for result in read(tmp_path / "bench.json")["results"]].count(gone["case"]) == 1
    assert read(tmp_path / "tests.json")["rows"].keys() == read(out / "tests.json")["rows"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stage_that_is_stopped_in_its_middle_leaves_whole_json(tmp_path, how):
    code = (
        "import fastreg_benchmarks.gpu as g; many = dict.fromkeys(map(str, range(99)), g.torch.float32);"
        f"g.smoke.DTYPES |= many; raise SystemExit(g.stage('smoke', g.Path({str(tmp_path)!r}), True, False))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        for _ in range(3):
            process.stdout.readline()
        process.send_signal(how)
        assert process.wait(30) != 0
    found = read(tmp_path / "smoke.json")
    assert not found["complete"] and len(found["rows"]) >= 3 and not any(map(failed, found["rows"].values()))


@pytest.mark.slow
def test_a_stage_is_stopped_at_its_limit_and_the_others_run(tmp_path, monkeypatch, capfd):
    """The limit of all stages is kept, too."""
    monkeypatch.setitem(gpu.LIMITS, "tests", 6.0)
    start = time.monotonic()
    assert gpu.run(["tests", "counters", "tune"], tmp_path, True, False, 20.0) == 1
    assert time.monotonic() - start < 40
    told = capfd.readouterr().out
    assert "== tests: stopped at its limit" in told and "== counters: ok" in told
    assert not read(tmp_path / "tests.json")["complete"] and read(tmp_path / "counters.json")["complete"]
    assert gpu.run(["smoke"], tmp_path, True, False, 1.0) == 1
    assert "smoke (no time was left)" in capfd.readouterr().out


def test_a_failure_is_told_and_kept(tmp_path):
    ledger = Ledger(tmp_path / "stage.json", {"stage": "toy"})
    ledger.attempt("good", lambda: {"value": float("nan")})
    ledger.attempt("bad", lambda: 1 / 0)
    found = read(tmp_path / "stage.json")
    assert (
        found["rows"]["good"]["value"] is None and "trace" in found["rows"]["bad"] and not found["complete"]
    )
    assert found["rows"]["bad"]["failed"] == "ZeroDivisionError: division by zero"
    again = Ledger(tmp_path / "stage.json", {"stage": "toy"})
    assert again.pending(["good", "bad", "new"]) == ["bad", "new"]
    again.add("bad", {})
    again.write(complete=True)
    assert read(tmp_path / "stage.json")["complete"]
    assert Ledger(tmp_path / "stage.json", {}, again=True).pending(["good"]) == ["good"]
    (tmp_path / "stage.json").write_text("{")
    assert Ledger(tmp_path / "stage.json", {}).rows == {}


def test_benchmarks_come_in_the_order_of_what_is_told():
    """Every headline is a case on a GPU, and all other cases follow."""

    class Gpu:
        type = "cuda"

    from fastreg_benchmarks import SUITES

    every = [case for name in SUITES for case in suite.cases(name, Gpu(), quick=True)]
    found = [case.name for case in gpu.ordered(every)]
    assert found[: len(gpu.HEADLINES)] == list(gpu.HEADLINES) and len(found) == len(every)


def test_activations_on_a_gpu_have_real_sizes():
    class Gpu:
        type = "cuda"

    for name in ("dropout", "noise"):
        sizes = {case.elements for case in suite.cases(name, Gpu(), quick=False) if hasattr(case, "elements")}
        assert {3 * 2**19, 6 * 2**20, 24 * 2**20, 2**28} <= sizes


@pytest.mark.parametrize("name", tune.TRIALS)
def test_trials_launch_what_they_tune_and_every_setting_compiles(name):
    """At most six settings of a kernel, the one in use first."""
    trial = tune.TRIALS[name]
    target = pack.Architecture("sm_90", 32, 132)
    settings = tune.settings(trial, target)
    assert settings[0] == launch_parameters(trial.kernel, target) and 3 <= len(set(settings)) <= tune.MOST
    with stub_driver() as launches:
        for setting in settings:
            run, moved = trial.make(torch.device("cpu"), True)
            launches.clear()
            tune.with_setting(trial.kernel, setting, run)
            assert f"{trial.kernel}_kernel" in launches and moved > 0


def test_all_kernels_that_matter_are_tuned():
    untuned = DEFAULTS.keys() - {trial.kernel for trial in tune.TRIALS.values()}
    assert untuned == {"unit_squares", "per_sample_factor", "adversarial_norm"}


def test_a_winner_is_a_line_to_paste():
    parameters = DEFAULTS["norm"]._replace(block=8192, warps=8)
    assert eval(tune._told(parameters), {"LaunchParameters": type(parameters)}) == parameters


def test_counters_are_read_from_what_ncu_prints():
    text = "\n".join((
        "==PROF== Connected to process 7", "copied to GPU",
        '"ID","Process ID","Kernel Name","Context","gpu__time_duration.sum","dram__bytes.sum.per_second"',
        '"","","","","ns","byte/s"',
        '"0","7","norm_kernel","1","152,000","3,012,345,678,901.5"',
        '"1","7","step_kernel(int)","1","1000","n/a"',
    ))  # fmt: skip
    assert counters.parsed(text) == {
        "norm_kernel": {"nanoseconds": 152000.0, "bytes_per_second": 3012345678901.5},
        "step_kernel": {"nanoseconds": 1000.0, "bytes_per_second": "n/a"},
    }
    assert counters.parsed("==ERROR== nothing") == {}


def test_what_is_sanitized_is_there():
    from fastreg_benchmarks import sanitize

    assert set(sanitize.CHOSEN) | set(sanitize.DRY) <= families.FAMILIES.keys()


def test_the_files_of_the_tests_are_there():
    assert all((ROOT / file).is_file() for file in (*device_tests.FILES, *device_tests.DRY))


def test_the_script_says_what_it_cannot_do(tmp_path):
    run = script("--wet", out=tmp_path)
    assert run.returncode == 2 and "--wet" in run.stderr
    run = script("smoke", "smell", out=tmp_path)
    assert run.returncode == 2 and "unknown stage 'smell'; choose from smoke, tests, bench" in run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run everything")
def test_without_a_gpu_it_says_so(tmp_path):
    run = script(out=tmp_path)
    assert run.returncode == 2 and "there is no GPU that torch can use; --dry" in run.stderr
