"""Runs the tests and measurements that need a GPU, in stages that have time limits and can be continued.

    python -m fastreg_benchmarks.gpu [--dry] [--out FOLDER] [--limit SECONDS] [--again] [STAGE ...]

| stage    | work                                                                      | results       |
|----------|---------------------------------------------------------------------------|---------------|
| smoke    | compares every family of kernels with the reference                       | smoke.json    |
| tests    | runs the kernel tests in several processes                                | tests.json    |
| bench    | runs the benchmarks until time is up, those of the README first           | bench.json    |
| tune     | times a few launch parameters of each kernel                              | tune.json     |
| counters | reads the hardware counters of five kernels with Nsight Compute           | counters.json |
| sanitize | runs kernels on odd and misaligned tensors under compute-sanitizer        | sanitize.json |

Each stage runs in its own process.  Its results are valid JSON at every moment.  A second call with the same
folder does only the work that is missing, has failed or was skipped.  Earlier results that
differ in machine, version or --dry are renamed, and the stage starts afresh.

`benchmarks/gpu.sh` calls this where fastreg is not installed.  `benchmarks/GPU.md` lists the files to copy to
the machine with the GPU, and the commands to run there.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import torch

from . import counters, device_tests, measure, sanitize, smoke, suite, tune
from .ledger import EARLIER, Ledger, failed, resumable, settled, version
from .suite import Case

LIMITS = {"smoke": 75, "tests": 150, "bench": 240, "tune": 100, "counters": 60, "sanitize": 150}
"""Most seconds of each stage, in the order in which they run."""
FIRST = ("smoke", "tests", "bench")
"""Stages that run by default; a dry run has all stages."""
WHOLE = 470
"""Most seconds of all stages of a call together, by default."""
FOLDER, DRY_FOLDER = Path("benchmarks/results/gpu"), Path("runs/gpu-dry")
"""Default folders for the results of real and of dry runs."""

HEADLINES = (
    "clip+AdamW, GPT-2 124M, fp32", "AdamW, GPT-2 124M, fp32", "clip+AdamW+EMA, GPT-2 124M, fp32",
    "clip+noise+AdamW+EMA, GPT-2 124M, fp32", "SAM+AdamW, GPT-2 124M, fp32", "MSAM+AdamW, GPT-2 124M, fp32",
    "dropout, 256M bf16, both passes", "bias+gelu+dropout+add, 256M bf16, both passes",
    "dropout, 6M bf16, both passes", "private step, 12 layers of 768, 16 x 256 tokens",
    "AdamW, 148 tiny tensors, Python and launch", "clip+AdamW, GPT-2 124M, bf16", "AdamW, GPT-2 124M, bf16",
    "gradient norm, GPT-2 124M, fp32", "ghost norms, 16 x 1024 positions, 768 and 3072 features, bf16",
)  # fmt: skip
"""Cases that the README reports, in its order; the other cases follow while there is time."""
STAGES = {"smoke": smoke.run, "tests": device_tests.run, "tune": tune.run, "counters": counters.run}


# One stage, in a process of its own -------------------------------------------------------------------------


def stage(name: str, out: Path, dry: bool, again: bool) -> int:
    """Runs a stage in this process; returns 0 if all is well, else 1."""
    where = "cpu" if dry else "cuda"
    if name == "bench":
        return bench(out / "bench.json", torch.device(where), dry, again)
    about = {"stage": name, "dry": dry, "machine": measure.machine(torch.device(where))}
    ledger = Ledger(out / f"{name}.json", about, again, interval=1.0 if name == "tests" else 0.0)
    with ledger.interruptible():
        good = sanitized(ledger, dry) if name == "sanitize" else STAGES[name](ledger, where, dry)
    ledger.write(complete=True)
    return 0 if good else 1


def bench(path: Path, where: torch.device, dry: bool, again: bool) -> int:
    """Runs the benchmarks; returns 1 if a result of fastreg is wrong, else 0.

    The file is like that of `fastreg bench`, and it is written after every case.
    """
    from fastreg.cli import document

    from . import SUITES, figure, report

    contents = report.document(where, quick=True) | {"dry": dry, "version": version()}
    contents |= resumable(path, "results", list, contents, again)
    results = {(result["suite"], result["case"]): result for result in contents["results"]}
    contents["complete"] = False
    if "copy_gbps" not in contents:
        contents["copy_gbps"] = copied(where)
    document.write(path, contents)
    print(f"copy: {contents['copy_gbps']:.0f} GB/s", flush=True)
    names = ("norm", "host") if dry else SUITES
    cases = [case for name in names for case in suite.cases(name, where, quick=True)]
    for case in pending(cases, results):
        result = results[case.suite, case.name] = suite.measured(case, where)[0]
        contents["results"] = list(results.values())
        document.write(path, contents)
        print(summary(result), flush=True)
    contents["complete"] = True
    document.write(path, contents)
    figure.draw(path.with_suffix(".png"), contents)
    return 1 if suite.refused(contents["results"]) else 0


def ordered(cases: Iterable[Case]) -> list[Case]:
    """Returns the cases with the `HEADLINES` first, then the others in their order."""
    order = {name: i for i, name in enumerate(HEADLINES)}
    return sorted(cases, key=lambda case: order.get(case.name, len(order)))


def pending(cases: Iterable[Case], results: dict[tuple[str, str], suite.Result]) -> list[Case]:
    """Returns the cases that have no result, then those with results that are wrong or skipped."""
    left = [(case, results.get((case.suite, case.name))) for case in ordered(cases)]
    missing = [case for case, result in left if result is None]
    return missing + [case for case, result in left if result and not finished(result)]


def finished(result: suite.Result) -> bool:
    """Returns whether a case need not be measured again.

    Peers that were skipped do not matter: they may not be installed.
    """
    rows = result["rows"].items()
    return settled(result) and all(
        settled(row) if name.startswith(suite.OURS) else not failed(row) for name, row in rows
    )


def copied(where: torch.device) -> float:
    """Measures the bandwidth of a copy on a device: bytes read and written, in 1e9 per second."""
    timings = measure.interleave({"copy": measure.copy(where)}, 5, measure.Clock(where))
    return 2 * measure.COPIED / measure.quantiles(timings["copy"].seconds, 1)["median"] / 1e9


def summary(result: suite.Result) -> str:
    """Returns a line with the times of all contenders of a case, and what is wrong."""
    rows = [
        f"{name} {row['ms']['median']:.3f} ms" + (f", {row['gbps']:.0f} GB/s" if "gbps" in row else "")
        for name, row in result["rows"].items() if "ms" in row
    ]  # fmt: skip
    wrong = [f"{name}: {row['wrong']}" for name, row in result["rows"].items() if "wrong" in row]
    return f"{result['case']}: {'; '.join((*rows, *wrong)) or result.get('skipped', 'nothing was measured')}"


def sanitized(ledger: Ledger, dry: bool) -> bool:
    """Runs families under compute-sanitizer, in a dry run without it; returns whether none has failed."""
    if not dry:
        probe = [sys.executable, "-c", "import torch; torch.ones(1, device='cuda').item()"]
        try:
            subprocess.run(["compute-sanitizer", *probe], capture_output=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            ledger.add("probe", {"failed": f"compute-sanitizer does not work here: {error}"})
            return False
        ledger.rows.pop("probe", None)
    names = sanitize.DRY if dry else sanitize.CHOSEN
    work = {f"{tool}, {name}": (tool, name) for tool in ("memcheck", "racecheck") for name in names}
    for row in ledger.pending(work):
        tool, name = work[row]
        command = [sys.executable, "-m", "fastreg_benchmarks.sanitize", name]
        if not dry:
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command]

        def check(command: list[str] = command) -> dict[str, Any]:
            done = subprocess.run(command, capture_output=True, text=True)
            end = (done.stdout + done.stderr)[-2000:]
            return (
                {"told": end}
                if done.returncode == 0
                else {"failed": f"status {done.returncode}", "told": end}
            )

        print(f"{row}: {ledger.attempt(row, check).get('failed', 'ok')}", flush=True)
    return not any(map(failed, ledger.rows.values()))


# All stages -------------------------------------------------------------------------------------------------


def run(names: list[str], out: Path, dry: bool, again: bool, limit: float) -> int:
    """Runs stages one after the other; returns 0 if all is well, else 1.

    Args:
        names: Stages to run, in this order.
        out: Folder of the results and of the log.
        dry: Whether to run a little of every stage on a CPU.
        again: Whether to start without earlier results.
        limit: Seconds for all stages together; each also has its own limit.
    """
    out.mkdir(parents=True, exist_ok=True)
    start, bad = time.monotonic(), []
    environment = dict(os.environ)
    if dry:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # tests may run at the same time
    else:
        environment.pop("TRITON_INTERPRET", None)
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        for name in names:
            left = limit - (time.monotonic() - start)
            if left < 5:
                bad.append(f"{name} (no time was left)")
                continue
            print(f"== {name}", flush=True)
            command = [sys.executable, "-m", "fastreg_benchmarks.gpu", "--stage", name, "--out", str(out)]
            command += ["--dry"] * dry + ["--again"] * again
            status, seconds = _within(min(LIMITS[name], left), command, environment, log)
            line = f"== {name}: {status} after {seconds:.0f} s"
            print(line, flush=True)
            log.write(line + "\n")
            if status != "ok":
                bad.append(f"{name} ({status})")
    print(f"FAILED: {', '.join(bad)}" if bad else f"all is well; results in {out}", flush=True)
    return 1 if bad else 0


def _within(limit: float, command: list[str], environment: dict[str, str], log: TextIO) -> tuple[str, float]:
    """Runs a command and prints the end of its output; returns its status and seconds.

    At its limit it is interrupted.  In any case, its process group is killed in the end.
    """
    start = time.monotonic()
    log.write(f"== {' '.join(command)}\n")
    log.flush()
    before = log.tell()
    process = subprocess.Popen(
        command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        code = process.wait(limit)
        status = "ok" if code == 0 else f"exit status {code}"
    except subprocess.TimeoutExpired:
        status = "stopped at its limit"
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(8)
        except subprocess.TimeoutExpired:
            pass
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    with open(log.name, encoding="utf-8", errors="replace") as shown:
        shown.seek(before)
        lines = shown.readlines()
    last = [line for line in lines[:-12] if line.startswith(EARLIER)] + lines[-12:]
    print("".join(last), end="", flush=True)
    log.seek(0, os.SEEK_END)
    return status, time.monotonic() - start


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 0 if all is well, 1 if a stage is not, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"of {', '.join(LIMITS)} (default: {', '.join(FIRST)})"
    )
    parser.add_argument("--dry", action="store_true", help="a little of every stage, without a GPU")
    parser.add_argument(
        "--out", type=Path, help=f"folder of the results (default: {FOLDER}, or {DRY_FOLDER} with --dry)"
    )
    parser.add_argument("--limit", type=float, default=WHOLE, help="seconds for all stages")
    parser.add_argument(
        "--again", action="store_true", help="all anew, not only what is missing, has failed or was skipped"
    )
    parser.add_argument("--stage", choices=list(LIMITS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    out: Path = options.out or (DRY_FOLDER if options.dry else FOLDER)
    if options.stage:
        return stage(options.stage, out, options.dry, options.again)
    if unknown := [name for name in options.stages if name not in LIMITS]:
        parser.error(f"unknown stage {unknown[0]!r}; choose from {', '.join(LIMITS)}")
    if not options.dry and not torch.cuda.is_available():
        print("there is no GPU that torch can use; --dry runs without one", file=sys.stderr)
        return 2
    names = [name for name in LIMITS if name in (options.stages or (LIMITS if options.dry else FIRST))]
    return run(names, out.resolve(), options.dry, options.again, options.limit)


if __name__ == "__main__":
    sys.exit(main())
