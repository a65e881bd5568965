"""`benchmarks/gpu.sh` and its stages, as far as they go without a GPU."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import fastreg
from fastreg.runtime import kernel_cache
from fastreg.runtime.launch_parameters import DEFAULTS, launch_parameters
from fastreg_benchmarks import counters, device_tests, families, gpu, measure, pack, suite, tune
from fastreg_benchmarks.ledger import Ledger, failed
from fastreg_benchmarks.stub import stub_driver

ROOT = Path(__file__).resolve().parents[2]


def script(*arguments, out, **environment):
    ours = {name: os.environ[name] for name in os.environ.keys() - {"TRITON_INTERPRET", "TRITON_CACHE_DIR"}}
    settings = ours | {"OUT": str(out), "PYTHON": sys.executable} | environment
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
        contents = read(out / f"{name}.json")
        assert contents["complete"] and contents["machine"]["versions"]["torch"] == version("torch")
        if name != "bench":
            assert contents["rows"] and not any(map(failed, contents["rows"].values()))
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
    names = [line.partition(":")[0] for line in run.stdout.splitlines()]
    assert {"dropout fp32", "penalty fp32"} == {
        name for name in names if name in smoke["rows"] or "penalty fp32" in name
    }
    assert "1 passed" in run.stdout
    assert [result["case"] for result in read(tmp_path / "bench.json")["results"]].count(gone["case"]) == 1
    assert read(tmp_path / "tests.json")["rows"].keys() == read(out / "tests.json")["rows"].keys()


def test_an_interrupt_that_a_library_catches_ends_the_stage(tmp_path):
    """And makes another error of it."""
    made = Ledger(tmp_path / "smoke.json", {})

    def caught():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise RuntimeError("KeyboardInterrupt()")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), made.interruptible():
        made.attempt("first", dict)
        made.attempt("second", caught)
    assert read(tmp_path / "smoke.json")["rows"].keys() == {"first"}
    assert signal.getsignal(signal.SIGINT) is before


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
    contents = read(tmp_path / "smoke.json")
    assert (
        not contents["complete"]
        and len(contents["rows"]) >= 3
        and not any(map(failed, contents["rows"].values()))
    )


@pytest.mark.slow
def test_a_stage_is_stopped_at_its_limit_and_the_others_run(tmp_path, monkeypatch, capfd):
    """The limit of all stages is kept, too."""
    monkeypatch.setitem(gpu.LIMITS, "tests", 6.0)
    start = time.monotonic()
    assert gpu.run(["tests", "counters", "tune"], tmp_path, True, False, 20.0) == 1
    assert time.monotonic() - start < 40
    output = capfd.readouterr().out
    assert "== tests: stopped at its limit" in output and "== counters: ok" in output
    assert not read(tmp_path / "tests.json")["complete"] and read(tmp_path / "counters.json")["complete"]
    assert gpu.run(["smoke"], tmp_path, True, False, 1.0) == 1
    assert "smoke (no time was left)" in capfd.readouterr().out


def test_a_failure_is_told_and_kept(tmp_path):
    ledger = Ledger(tmp_path / "stage.json", {"stage": "toy"})
    ledger.attempt("good", lambda: {"value": float("nan")})
    ledger.attempt("bad", lambda: 1 / 0)
    contents = read(tmp_path / "stage.json")
    assert (
        contents["rows"]["good"]["value"] is None
        and "trace" in contents["rows"]["bad"]
        and not contents["complete"]
    )
    assert contents["rows"]["bad"]["failed"] == "ZeroDivisionError: division by zero"
    again = Ledger(tmp_path / "stage.json", {"stage": "toy"})
    assert again.pending(["good", "bad", "new"]) == ["bad", "new"]
    again.add("bad", {})
    again.write(complete=True)
    assert read(tmp_path / "stage.json")["complete"]
    assert Ledger(tmp_path / "stage.json", {}, again=True).pending(["good"]) == ["good"]
    (tmp_path / "stage.json").write_text("{")
    assert Ledger(tmp_path / "stage.json", {}).rows == {}


GPU = {"stage": "toy", "dry": False, "machine": {"device": "NVIDIA H100"}}


@pytest.mark.parametrize(
    "other, message",
    [
        ({"dry": True}, "differ in --dry and are kept"),
        ({"machine": {"device": "NVIDIA H200"}}, "differ in machine and are kept"),
        ({}, "differ in version of fastreg or triton and are kept"),
    ],
)
def test_results_of_another_machine_or_version_are_kept_beside(tmp_path, monkeypatch, capfd, other, message):
    Ledger(tmp_path / "stage.json", GPU | other).add("good", {})
    if not other:
        monkeypatch.setattr(kernel_cache, "identity", lambda: "mended")
    for left in (["good"], []):
        ledger = Ledger(tmp_path / "stage.json", GPU)
        assert ledger.pending(["good"]) == left and len(list(tmp_path.iterdir())) == 2
        ledger.add("good", {"value": 2})
    assert message in capfd.readouterr().out
    assert read(tmp_path / "stage.old-1.json")["rows"] == {"good": {}}
    assert Ledger(tmp_path / "stage.json", GPU, again=True).rows == {}
    assert read(tmp_path / "stage.old-2.json")["rows"] == {"good": {"value": 2}}


def test_what_was_skipped_or_wrong_is_done_again(tmp_path):
    ledger = Ledger(tmp_path / "stage.json", GPU)
    ledger.add("passed", {"outcome": "passed"})
    rows = {"wrong": {"wrong": "off"}, "skipped": {"skipped": "no ncu"}, "test": {"outcome": "skipped"}}
    for name, row in rows.items():
        ledger.add(name, row)
    assert Ledger(tmp_path / "stage.json", GPU).pending(["passed", *rows]) == list(rows)


@pytest.fixture
def toys(monkeypatch):
    """Gives the cases that `gpu.bench` measures, and what each comes to."""
    from types import SimpleNamespace

    from fastreg_benchmarks import figure

    done, outcomes = [], {}
    toys = [SimpleNamespace(suite="norm", name=name) for name in "abcdef"]

    def measured(case, where):
        done.append(case.name)
        result = {"suite": case.suite, "case": case.name, "rows": {"fastreg": {"ms": {"median": 1.0}}}}
        return result | outcomes.get(case.name, {}), {}

    monkeypatch.setattr(suite, "cases", lambda name, *_, **__: toys if name == "norm" else [])
    monkeypatch.setattr(suite, "measured", measured)
    monkeypatch.setattr(gpu, "copied", lambda where: float(len(done)))
    monkeypatch.setattr(figure, "draw", lambda *_: None)
    return done, outcomes


def test_benchmarks_go_on_with_what_is_missing_then_with_what_was_wrong_or_skipped(tmp_path, toys):
    done, outcomes = toys
    outcomes |= {
        "a": {"skipped": "no data", "rows": {}},
        "b": {"rows": {"fastreg": {"wrong": "off by 1"}}},
        "c": {"rows": {"fastreg": {}, "peer": {"wrong": "off by 1"}}},
        "d": {"rows": {"fastreg": {}, "peer": {"skipped": "not installed"}}},
        "e": {"rows": {"fastreg": {"skipped": "out of memory"}, "peer": {}}},
    }
    path, cpu = tmp_path / "bench.json", torch.device("cpu")
    assert gpu.bench(path, cpu, True, False) == 1
    contents = read(path)
    contents["results"] = [result for result in contents["results"] if result["case"] != "f"]
    path.write_text(json.dumps(contents))
    done.clear()
    outcomes.clear()
    assert gpu.bench(path, cpu, True, False) == 0 and done == ["f", "a", "b", "c", "e"]
    contents = read(path)
    assert [result["case"] for result in contents["results"]] == list("abcdef") and contents["complete"]
    assert all("skipped" not in result for result in contents["results"])
    assert gpu.bench(path, cpu, True, False) == 0 and len(done) == 5


def test_benchmarks_of_two_machines_are_not_mixed(tmp_path, toys, monkeypatch):
    done, _ = toys
    path, cpu, machine = tmp_path / "bench.json", torch.device("cpu"), measure.machine(torch.device("cpu"))
    for i, name in enumerate(("NVIDIA H200", "NVIDIA H100")):
        monkeypatch.setattr(measure, "machine", lambda where, name=name: machine | {"device": name})
        gpu.bench(path, cpu, False, False)
        contents = read(path)
        assert (
            contents["machine"]["device"] == name
            and contents["copy_gbps"] == 6 * i
            and len(done) == 6 * i + 6
        )
    assert read(tmp_path / "bench.old-1.json")["machine"]["device"] == "NVIDIA H200"
    monkeypatch.setattr(kernel_cache, "identity", lambda: "mended")
    gpu.bench(path, cpu, False, False)
    assert len(done) == 18 and (tmp_path / "bench.old-2.json").exists()


def test_dry_runs_have_a_folder_of_their_own(monkeypatch):
    folders = []
    monkeypatch.setattr(gpu, "run", lambda names, out, *_: folders.append(out) or 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert gpu.main(["--dry"]) == gpu.main([]) == gpu.main(["--dry", "--out", "here"]) == 0
    assert folders == [gpu.DRY_FOLDER.resolve(), gpu.FOLDER.resolve(), Path("here").resolve()]
    assert folders[0] != folders[1]


def test_what_is_kept_beside_is_told_whatever_follows(tmp_path, capfd):
    code = "print('earlier results in a.json are kept'); [print(i) for i in range(50)]"
    with (tmp_path / "log.txt").open("a") as log:
        assert gpu._within(30, [sys.executable, "-c", code], dict(os.environ), log)[0] == "ok"
    lines = capfd.readouterr().out.splitlines()
    assert lines == ["earlier results in a.json are kept", *map(str, range(38, 50))]


def test_benchmarks_come_in_the_order_of_what_is_told():
    """Every headline is a case on a GPU, and all other cases follow."""

    class Gpu:
        type = "cuda"

    from fastreg_benchmarks import SUITES

    cases = [case for name in SUITES for case in suite.cases(name, Gpu(), quick=True)]
    names = [case.name for case in gpu.ordered(cases)]
    assert names[: len(gpu.HEADLINES)] == list(gpu.HEADLINES) and len(names) == len(cases)


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
            computed = []
            tune.with_setting(trial.kernel, setting, lambda run=run, to=computed: to.append(run()))
            assert tune._tensors(computed)
            assert f"{trial.kernel}_kernel" in launches and moved > 0


def test_all_kernels_that_matter_are_tuned():
    untuned = DEFAULTS.keys() - {trial.kernel for trial in tune.TRIALS.values()}
    assert untuned == {"unit_squares", "adversarial_norm"}


def toy(result):
    """A trial of three settings, whose run gives what `result` makes of the setting."""
    target = pack.Architecture("sm_90", 32, 132)

    def make(where, dry):
        return lambda: result(launch_parameters("dropout", target)), 8

    return tune.Trial("dropout", make, ({"block": 4096}, {"block": 8192}))


def out_of_shared_memory(chosen):
    if chosen.block == 8192:
        raise RuntimeError("out of resource: shared memory")
    return torch.ones(3)


def second_is_off(chosen):
    return torch.zeros(3), {"state": torch.full((3,), float(chosen.block == 4096))}


def test_a_setting_that_computes_something_else_fails_the_stage(tmp_path, monkeypatch):
    """One that needs more than there is does not."""
    monkeypatch.setitem(tune.TRIALS, "dropout, 6 M bf16", toy(second_is_off))
    ledger = Ledger(tmp_path / "tune.json", {})
    assert not tune.run(ledger, "cpu", True)
    (row,) = ledger.rows.values()
    assert [what.rpartition("(")[2][:4] for what in row["wrong"]] == ["4096"] and not row["refused"]
    assert set(row["wrong"].values()) == {"off by 1.0e+00"} and len(row["ms"]) == 2
    assert "4096" not in row["best"] and ledger.pending(["dropout, 6 M bf16"])
    monkeypatch.setitem(tune.TRIALS, "dropout, 6 M bf16", toy(out_of_shared_memory))
    assert tune.run(ledger, "cpu", True)
    (row,) = ledger.rows.values()
    assert len(row["refused"]) == 1 and "wrong" not in row


@pytest.mark.parametrize("what", ["parameter", "state", "nothing"])
def test_steps_of_every_setting_are_compared(monkeypatch, what):
    honest = fastreg.AdamW.step

    def step(self):
        honest(self)
        (p,) = self.param_groups[0]["params"]
        state = next(tensor for tensor in self.state[p].values() if tensor.shape == p.shape)
        changed = {"parameter": p.detach(), "state": state, "nothing": torch.zeros(1)}
        changed[what] += launch_parameters("step", target).warps == 8

    monkeypatch.setattr(fastreg.AdamW, "step", step)
    target = pack.Architecture("sm_90", 32, 132)
    trial = tune.TRIALS["step, AdamW fp32"]
    row = tune.tried(trial, torch.device("cpu"), target, True)
    if what == "nothing":
        assert "wrong" not in row
    else:
        assert len(row["wrong"]) == 3 and all("warps=8" in name for name in row["wrong"])


def test_a_winner_is_a_line_to_paste():
    parameters = DEFAULTS["norm"]._replace(block=8192, warps=8)
    assert eval(tune._describe(parameters), {"LaunchParameters": type(parameters)}) == parameters


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


@pytest.mark.slow
def test_the_script_says_what_it_cannot_do(tmp_path):
    run = script("--wet", out=tmp_path)
    assert run.returncode == 2 and "--wet" in run.stderr
    run = script("smoke", "smell", out=tmp_path)
    assert run.returncode == 2 and "unknown stage 'smell'; choose from smoke, tests, bench" in run.stderr


def shared(folder):
    folder.mkdir()
    folder.chmod(0o777)


def linked(folder):
    (folder.parent / "mine").mkdir()
    folder.symlink_to(folder.parent / "mine")


def foreign(folder):
    if os.getuid():
        pytest.skip("only root can give a folder away")
    folder.mkdir(mode=0o755)
    os.chown(folder, 12345, 12345)


@pytest.mark.parametrize("make", [shared, linked, foreign])
def test_launchers_of_others_are_not_run(tmp_path, monkeypatch, capsys, make):
    """Neither unpacked over, nor filled."""
    folder = tmp_path / "fastreg-triton"
    make(folder)
    run = unpacking(folder)
    assert run.returncode == 2 and f"{folder} is not a folder that you alone can write to" in run.stderr
    assert "remove it" in run.stderr and not list(folder.iterdir())
    monkeypatch.setattr(pack, "CACHE", folder)
    with pytest.raises(SystemExit, match="2"):
        pack.main([])
    error = capsys.readouterr().err
    assert f"{folder} is not a folder that you alone can write to" in error and "remove it" in error


def test_launchers_of_ones_own_are_unpacked_and_filled_anew(tmp_path):
    folder = tmp_path / "fastreg-triton"
    for _ in range(2):
        run = unpacking(folder)
        assert run.returncode == 0 and not run.stderr, run.stderr
        assert (folder / "launcher").read_text() == "packed" and folder.stat().st_mode & 0o077 == 0o055
        assert folder.stat().st_uid == os.getuid()
    pack.claim(folder)
    assert not list(folder.iterdir()) and folder.stat().st_mode & 0o777 == 0o700


def unpacking(folder):
    """Run the script on a packed folder that anyone can write to, with another place and without Python."""
    site = folder.parent / "checkout" / "benchmarks"
    (site / "made" / folder.name).mkdir(parents=True, exist_ok=True)
    (site / "made" / folder.name).chmod(0o777)
    (site / "made" / folder.name / "launcher").write_text("packed")
    subprocess.run(["tar", "-czf", "packed", "-C", "made", folder.name], cwd=site, check=True)
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    (site / "gpu.sh").write_text(text.replace("/tmp/fastreg-triton", str(folder)))
    settings = {k: v for k, v in os.environ.items() if k != "TRITON_CACHE_DIR"}
    settings |= {"CARRY": "benchmarks/packed", "PYTHON": shutil.which("true")}
    return subprocess.run(["bash", site / "gpu.sh"], env=settings, capture_output=True, text=True)


@pytest.mark.parametrize("target", ["gfx942", "sm_75", "h100"])
def test_targets_without_launchers_are_refused(target, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(pack, "CACHE", tmp_path / "place")
    with pytest.raises(SystemExit, match="2"):
        pack.main(["--target", target])
    error = " ".join(capsys.readouterr().err.split())
    assert "--target: " in error and f"got {target!r}" in error and not (tmp_path / "place").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run everything")
def test_without_a_gpu_it_says_so(tmp_path):
    run = script(out=tmp_path)
    assert run.returncode == 2 and "there is no GPU that torch can use; --dry" in run.stderr


def test_a_python_without_torch_is_told(tmp_path):
    run = script("--help", out=tmp_path, PYTHON=shutil.which("false"))
    assert run.returncode == 2 and "lacks torch, triton or pytest: set PYTHON to" in run.stderr
