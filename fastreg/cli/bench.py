"""Runs `fastreg bench`: times the benchmark suites, as a table, a picture and JSON."""

import argparse
from typing import Any

from fastreg_benchmarks import SUITES

from . import document
from .usage import UsageError, device, folder, require

DESCRIPTION = """\
Time fastreg against torch and other libraries on this machine. Contenders take turns, and one that computes
something else than its baseline is refused. Prints a table for each case and writes a picture and everything
as JSON. The full run takes about twenty minutes, --quick about five."""


def add_parser(commands: Any) -> None:
    """Adds the subcommand `bench` to the command line."""
    summary = "time fastreg against torch and other libraries"
    parser = commands.add_parser("bench", help=summary, description=DESCRIPTION)
    parser.add_argument("--quick", action="store_true", help="smaller models and fewer rounds")
    parser.add_argument(
        "--suite", metavar="NAME,...", default=",".join(SUITES), help=f"of {', '.join(SUITES)} (default: all)"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--out", metavar="FOLDER", help="where results go (default: runs/bench-<time>)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the suites; results from before Ctrl-C are kept."""
    chosen = tuple(name.strip() for name in args.suite.split(",") if name.strip())
    for name in chosen:
        if name not in SUITES:
            raise UsageError(f"--suite: unknown suite {name!r}; choose from {', '.join(SUITES)}")
    if not chosen:
        raise UsageError(f"--suite names no suite, got {args.suite!r}; for example --suite rules,norm")
    require("bench", "bench", "matplotlib", "rich")
    target = device(args.device)

    from rich.console import Console

    from fastreg_benchmarks import figure, report, suite

    out = folder(args.out, "bench")
    console = Console(highlight=False)
    contents = report.document(target, args.quick)
    console.print(f"[bold]{report.machine_line(contents)}[/]\n", soft_wrap=True)
    results, interrupted = contents["results"], False
    try:
        for case in (case for name in chosen for case in suite.cases(name, target, args.quick)):
            with console.status(case.name):
                results.append(suite.measured(case, target)[0])
            report.show(console, results[-1])
    except KeyboardInterrupt:
        interrupted = contents["interrupted"] = True
    document.write(out / "bench.json", contents)
    figure.draw(out / "bench.png", contents)
    for note in report.notes(results):
        console.print(note, style="dim", soft_wrap=True, markup=False)
    console.print(f"\n[bold]{out / 'bench.png'}[/]  {out / 'bench.json'}", soft_wrap=True)
    if interrupted:
        console.print("interrupted: what was done until then is kept")
        return 130
    return 1 if suite.refused(results) else 0
