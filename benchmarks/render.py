"""Renders the measured figures of the READMEs from the JSON files in `benchmarks/results`.

benchmarks/results/audit.json          the code audit (`make audit`)
benchmarks/results/*/bench.json        runs of `fastreg bench`, one folder for each machine
benchmarks/results/cold_start.json     first steps of processes (`make results`)
benchmarks/results/versions/*.json     tests on other versions (`nox`)
            ──render──▶ benchmarks/results/README.md, and the marked parts of README.md
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from fastreg.optim import registry

from . import audit, chains, operators, report
from .suite import OURS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- rendered by `make render` -->", "<!-- end of what is rendered -->"
VERSIONS = "<!-- versions, rendered by `make render` -->"
OPTIMIZERS = re.compile("(?<=<!-- optimizers -->).*(?=<!-- end -->)")
COLD_START = "<!-- cold start, rendered by `make render` -->"

COMPOSED = {"clip": 12, "noise": 16, "EMA": 12, "SWA": 12, "Lookahead": 20, "SAM": 48, "dp": 28}
"""Bytes per float32 parameter of each part where it is composed of torch's functions.

clip: `clip_grad_norm_`.  noise: `randn_like` with `add_`.  EMA and SWA: `_foreach_lerp_`; Lookahead: with
`_foreach_copy_`.  SAM: davda54/sam around a step, that is norm 12, copy 8, perturbation 28.  dp: Opacus on a
sum of clipped gradients, that is zeros 4, normal 4, add 12, scale 8."""
BESIDE = ("EMA", "SWA", "Lookahead")
"""Parts whose 8 bytes of state fastreg moves in the step, and a composition in a separate pass."""


NO_GPU = """\
**No GPU has run these kernels yet.** What is measured is their machine code, compiled ahead of time, and
the CPU path."""
MACHINE_CODE = """\
Machine code for an H100 (sm_90; `make audit` also reads sm_80, sm_100 and gfx942): all main-path accesses
are 128 bits wide, nothing spills, nothing lies in local memory. Where clipping needs the norm, its read of
the gradients is included. An H200 can issue about 7.8 instructions per byte it copies; these need 1 to 4.5,
so they should be bound by memory."""
COMPOSED_OF = """\
The last column counts the bytes of `clip_grad_norm_` (12), the rule's own fused step, `_foreach_lerp_`
(12), and `randn_like` with `add_` (16)."""
COMPOSED_OF_SAM = """\
Lookahead's is the step that synchronises, every fifth, with `_foreach_lerp_` and `_foreach_copy_` (20).
SAM's are both of its steps, around torch's fused one as davda54/sam makes them (48). MSAM has none. A
private step (dp) starts from the sum of clipped gradients, with noise and scaling as Opacus has them (28)."""
ABOUT_MODULES = """\
Bytes of biases and of rates for each channel are counted, though they come from a cache. Dropout's 2.5 to
5 instructions per byte leave less room than an optimizer's step; Gaussian noise in bfloat16 takes 10, which
even at perfect issue bounds it to three quarters of the rate of a copy."""
ABOUT = """\
Rendered by `make render` from the JSON files in this folder; `make results` measures the CPU anew.
Contenders of a case take turns and times are medians; *times faster* is against the contender that has
1.00 there; *of copy* compares with a copy in the same rounds; *extra MiB* is the peak of a step above what
is held before it; the first step includes compilation where caches did not have it. What computes
something else is refused. An optimizer's *share* is of the median forward and backward pass of all rows."""
ALL_KERNELS = """\
*bytes* and *instr* are per element; *bound* is what limits a kernel on an H200 at perfect issue."""


def runs() -> dict[str, dict[str, Any]]:
    """Returns the committed runs by the name of their folder, those on GPUs first."""
    files = RESULTS.glob("*/bench.json")
    read = {file.parent.name: json.loads(file.read_text("utf-8")) for file in files}
    return dict(sorted(read.items(), key=lambda item: (not _on_gpu(item[1]), item[0])))


def audited() -> dict[str, Any]:
    """Returns the committed results of the code audit."""
    return json.loads((RESULTS / "audit.json").read_text("utf-8"))


def _on_gpu(run: dict[str, Any]) -> bool:
    return "multiprocessors" in run["machine"]


def performance() -> str:
    """Returns the rendered section on performance of the main README."""
    all_runs = runs()
    parts = []
    if not any(map(_on_gpu, all_runs.values())):
        parts.append(NO_GPU)
    parts += [_summary(name, run) for name, run in all_runs.items() if _on_gpu(run)]
    parts += [_machine_code(), _machine_code_of_modules()]
    parts += [_summary(name, run) for name, run in all_runs.items() if not _on_gpu(run)]
    parts.append("All tables: [benchmarks/results](benchmarks/results/README.md).")
    return "\n\n".join(parts)


def _machine_code() -> str:
    rows = {row["kernel"]: row for row in audited()["rows"] if row["target"] == "sm_90"}
    shown, lines = {kernel.rpartition(" ")[0] for kernel in rows} & SHOWN, []
    for kernel, row in rows.items():
        chain, _, storage = kernel.rpartition(" ")
        if storage != "fp32" or chain not in shown:
            continue
        parts = chain.split("+")
        taken = [row, *(rows[f"{name} fp32"] for name in _passes_of(parts))]
        composed = row["bytes"] + sum(COMPOSED.get(part, 0) - 8 * (part in BESIDE) for part in parts)
        lines.append([
            chain, str(sum(taking["bytes"] for taking in taken)),
            f"{sum(taking['instructions'] for taking in taken):.0f}", str(row["registers"]),
            "" if "MSAM" in parts else str(composed),
        ])  # fmt: skip
    headings = [
        "chain, float32",
        "bytes per parameter",
        "instructions",
        "registers",
        "bytes, composed of torch's parts",
    ]
    about = f"{COMPOSED_OF} {COMPOSED_OF_SAM}" if "SAM+AdamW" in shown else COMPOSED_OF
    return f"{MACHINE_CODE}\n\n{report.markdown(headings, lines)}\n\n{about}"


def _machine_code_of_modules() -> str:
    rows = {row["kernel"]: row for row in audited()["rows"] if row["target"] == "sm_90"}
    lines = [
        [name, str(row["bytes"]), f"{row['instructions']:.0f}", str(row["registers"])]
        for name in MODULES
        if (row := rows.get(f"{name} bf16"))
    ]
    headings = ["on activations and inputs, bfloat16", "bytes per element", "instructions", "registers"]
    return f"{report.markdown(headings, lines)}\n\n{ABOUT_MODULES}"


SHOWN = {*chains.BUDGETS, "largest", "unit squares"} - {"AdamW+pullback"}
"""Kernels in the table of the main README: whole steps, and norms that torch has as well."""
MODULES = (*operators.DROPOUT, *operators.NOISE, *operators.ADVERSARIAL)
"""Kernels on activations and inputs, in the order of their table."""


def _passes_of(parts: list[str]) -> list[str]:
    """Returns the audited passes that a chain needs before its step."""
    if "SAM" in parts:
        return ["norm", "SAM climb"]
    if "MSAM" in parts:
        return [f"momentum norm, {chains.rule('+'.join(parts))}"]
    measured = "noised norm" if "dp" in parts else "norm"
    return [measured] if "clip" in parts else []


def _summary(name: str, run: dict[str, Any]) -> str:
    """Returns a summary of a run: fastreg against the baseline, a line for each case."""
    lines = []
    for result in run["results"]:
        ours, theirs = result["rows"].get(OURS, {}), result["rows"].get(result["baseline"], {})
        if "ms" in ours and "ms" in theirs:
            ratio = ours["ratio"]
            lines.append([
                result["case"], report.duration(ours["ms"]["median"]),
                f"{report.duration(theirs['ms']['median'])} ({result['baseline']})",
                f"**{ratio['median']:.2f}**", f"{ratio['q20']:.2f}\N{EN DASH}{ratio['q80']:.2f}",
            ])  # fmt: skip
    headings = ["one step", "fastreg", "baseline", "times faster", "20\N{EN DASH}80 % of rounds"]
    parts = [f"{report.machine_line(run)} (`fastreg bench`):", report.markdown(headings, lines)]
    parts += [
        _training(result) for result in run["results"] if result["suite"] == "training" and result["rows"]
    ]
    parts.append(f"![Speed-up and bandwidth](benchmarks/results/{name}/bench.png)")
    return "\n\n".join(parts)


def _training(result: dict[str, Any]) -> str:
    rows = result["rows"]
    lines = []
    for label in (name.removeprefix(f"{OURS} ") for name in rows if name.startswith(OURS)):
        pair = [rows.get(f"{who} {label}", {}) for who in ("torch", OURS)]
        if all("ms" in row for row in pair):
            shares = [report.share(result, row) for row in pair]
            lines.append([
                label, *(report.duration(row["ms"]["median"]) for row in pair),
                *(report.duration(row["optimizer_ms"]["median"]) for row in pair),
                " \N{RIGHTWARDS ARROW} ".join(f"{share:.0%}" for share in shares),
            ])  # fmt: skip
    headings = [
        result["case"], "torch", "fastreg", "its optimizer: torch", "fastreg", "optimizer's share",
    ]  # fmt: skip
    return report.markdown(headings, lines)


def tables(name: str, run: dict[str, Any]) -> str:
    """Returns a run as Markdown: machine, versions, picture, a table for each case, and notes.

    `name` is the folder of the picture: empty, or with a slash at its end.
    """
    versions = ", ".join(f"{key} {value}" for key, value in run["machine"]["versions"].items() if value)
    clocks = next((result["clocks"] for result in run["results"] if result.get("clocks")), None)
    about = [f"measured {run['created'][:10]}", versions, f"clocks: {clocks}" if clocks else ""]
    parts = [f"## {report.machine_line(run)}", "; ".join(filter(None, about))]
    parts.append(f"![Speed-up and bandwidth]({name}bench.png)")
    for result in run["results"]:
        if "skipped" not in result:
            parts += [f"**{report.heading(result)}**", report.markdown(*report.table(result))]
    parts.append("\n".join(f"- {note}" for note in report.notes(run["results"])))
    return "\n\n".join(filter(None, parts))


def everything() -> str:
    """Returns the whole text of `benchmarks/results/README.md`."""
    versions = ", ".join(f"{key} {value}" for key, value in audited()["versions"].items())
    parts = ["# Results", ABOUT, *(tables(f"{name}/", run) for name, run in runs().items())]
    parts += [
        "## Machine code",
        f"Every kernel entry point and shipped chain, compiled ahead of time ({versions}).\n{ALL_KERNELS}",
        f"```\n{audit.table(audited()['rows'])}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def versions() -> str:
    """Returns the table of tested versions and numbers of tests, from the records of `noxfile.py`."""
    records = {path.stem: json.loads(path.read_text("utf-8")) for path in RESULTS.glob("versions/*.json")}
    order = [name for name in ("oldest", "pinned", "newest") if name in records]
    lines = []
    for name in order:
        record = records[name]
        results = [
            f"{record[part]['passed']} passed, {record[part]['skipped']} skipped"
            + f", {record[part].get('second_attempt')} at a second attempt"
            * ("second_attempt" in record[part])
            + f", {record[part]['failed']} failed" * bool(record[part]["failed"])
            for part in ("tests", "machine code")
        ]
        lines.append([name, *record["versions"].values(), *results])
    packages = records[order[0]]["versions"] if order else ()
    headings = ["", *packages, "tests", "of machine code and launches"]
    return report.markdown(headings, lines)


def cold_start() -> str:
    """Returns a paragraph on the time that first steps and compiling ahead of time take."""
    starts = json.loads((RESULTS / "cold_start.json").read_text("utf-8"))
    step, kernels, machine = starts["compiled_step"], starts["kernels"], starts["machine"]
    first, later = f"{step['first_process']:.0f} s", f"{step['later_process'] * 1000:.0f} ms"
    size, seconds = f"{kernels['bytes'] / 1e6:.0f} MB", f"{kernels['seconds']:.0f} s"
    return (
        f"On {machine['threads']} threads of an {machine['device']}, the first step of {step['chain']} took "
        f"{first} in the first process\nand {later} in later ones. `fastreg precompile` compiled "
        f"{kernels['kernels']} kernels for {kernels['target']}, {size}, in {seconds}\non these. "
        "([figures](benchmarks/results/cold_start.json))"
    )


def optimizers() -> str:
    """Returns the names of all optimizers, with their features, separated by commas."""
    entries = registry.OPTIMIZERS.values()
    return ", ".join(f"`{e.optimizer.__name__}`" + f" ({e.features})" * bool(e.features) for e in entries)


def rendered() -> dict[Path, str]:
    """Returns the up-to-date text of each rendered file, by path.

    Raises:
        ValueError: If the main README lacks the comments around a rendered part.
    """
    readme = ROOT / "README.md"
    text = OPTIMIZERS.sub(optimizers(), readme.read_text("utf-8"))
    for begin, what in ((BEGIN, performance), (COLD_START, cold_start), (VERSIONS, versions)):
        before, _, rest = text.partition(begin)
        _, end, after = rest.partition(END)
        if not end:
            raise ValueError(f"{readme} does not hold {begin!r} and {END!r}")
        text = f"{before}{begin}\n\n{what()}\n\n{END}{after}"
    return {readme: text, RESULTS / "README.md": everything()}


def main(arguments: list[str] | None = None) -> int:
    """Writes the files, or checks whether they are up to date; returns an exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastreg_benchmarks.render", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    parser.add_argument("--only", type=Path, metavar="FOLDER", help="of one run: its README.md beside it")
    options = parser.parse_args(arguments)
    if options.only:
        run = json.loads((options.only / "bench.json").read_text("utf-8"))
        (options.only / "README.md").write_text(f"{ABOUT}\n\n{tables('', run)}\n", "utf-8")
        return 0
    stale = {
        path: text
        for path, text in rendered().items()
        if not path.exists() or path.read_text("utf-8") != text
    }
    for path, text in stale.items():
        print(f"{'out of date' if options.check else 'written'}: {path.relative_to(ROOT)}")
        if not options.check:
            path.write_text(text, "utf-8")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
