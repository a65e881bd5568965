"""Runs `fastreg compare`: reads the arguments, trains all contenders, writes the results."""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING, Any

from ..usage import UsageError, count, device, folder, non_negative, positive, require, whole
from . import choice, contenders

if TYPE_CHECKING:
    from .results import Record
    from .resume import RunFile

DESCRIPTION = """\
Train a causal language model on text with several regularizers side by side: the same initial weights, the
same batches, the same hyper-parameters but for the regularizer. Ends with a table, a verdict for each
regularizer, curves as PNG and everything as JSON. With no arguments, a small GPT-2 learns from too little
text in about three minutes on a laptop, and overfits."""

OPTIONS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("--with", "LIST", "contenders, comma-separated (%(default)s)",
     {"dest": "contenders", "default": contenders.DEFAULT}),
    ("--recipe", "FILE", "more contenders, each a recipe in YAML (see fastreg recipe) named after its file",
     {"nargs": "+", "default": []}),
    ("--model", "NAME",
     "pre-trained causal language model: on the Hugging Face hub or a folder (small GPT-2)", {}),
    ("--text", "FILE", "text to learn from, UTF-8 (the language reference inside Python)", {"nargs": "+"}),
    ("--steps", "N", "training steps (%(default)s)", {"type": count, "default": 450}),
    ("--batch-size", "N", "windows in a batch (%(default)s)", {"type": count, "default": 8}),
    ("--block-size", "N", "tokens in a window, at least 2 (%(default)s)", {"type": count, "default": 64}),
    ("--lr", "X", "learning rate (2e-3, with --model 5e-5)", {"type": positive}),
    ("--warmup", "N", "steps of linear warm-up (%(default)s)", {"type": whole, "default": 20}),
    ("--weight-decay", "X", "of all but `decay` (%(default)s)", {"type": non_negative, "default": 0.01}),
    ("--train-tokens", "N", "size of the training share (8000, with --text 90 %%)", {"type": count}),
    ("--val-tokens", "N", "size of the validation share behind it (12000, with --text the rest)",
     {"type": count}),
    ("--eval-every", "N", "steps between points of the curves (%(default)s)", {"type": count, "default": 25}),
    ("--seed", "N", "seed of weights, batches and noise (%(default)s)", {"type": whole, "default": 0}),
    ("--seeds", "N", "train each contender with this many seeds, --seed and those after it (%(default)s)",
     {"type": count, "default": 1}),
    ("--device", "NAME", "such as cpu or cuda:1 (cuda where there is one)", {}),
    ("--out", "DIR", "folder for the results (runs/compare-DATE-TIME)", {}),
    ("--resume", "DIR", "go on with the interrupted run in this folder, with the same results", {}),
)  # fmt: skip


class Explicit(argparse.Action):
    """Stores a value, and adds its name to the list `explicit` of the namespace."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Stores the value and the name."""
        setattr(namespace, self.dest, values)
        namespace.explicit = [*getattr(namespace, "explicit", ()), self.dest]


def add_parser(commands: Any) -> None:
    """Adds the subcommand `compare` to the command line."""
    summary = "train with several regularizers side by side: which helps, what does it cost"
    names = textwrap.indent(choice.list_contenders(), "  ")
    epilog = f"contenders (combine with +, set the strength with =, as in clip=0.5+ema):\n{names}"
    parser = commands.add_parser("compare", help=summary, description=DESCRIPTION, epilog=epilog)
    for flag, metavar, text, options in OPTIONS:
        parser.add_argument(flag, metavar=metavar, help=text, action=Explicit, **options)
        if flag == "--recipe":
            parser.add_argument("--list", action="store_true", help="list the contenders and exit")
    parser.set_defaults(run=run, explicit=())


def run(args: argparse.Namespace) -> int:
    """Trains and compares all contenders; first refuses input that cannot be used."""
    if args.list:
        print(choice.list_contenders())
        return 0
    if args.resume is not None:
        require("compare", "cli", "matplotlib", "rich", "transformers")
        from .resume import RunFile

        run_file = RunFile.read(args.resume)
        run_file.restore_arguments(args)
    chosen = choice.choose(args.contenders, args.recipe)
    if args.block_size < 2:
        raise UsageError(
            f"--block-size must be >= 2, got {args.block_size}: each token is predicted from those before it"
        )
    if args.lr is None:
        args.lr = 2e-3 if args.model is None else 5e-5
    require("compare", "cli", "matplotlib", "rich", "transformers")

    import huggingface_hub
    import transformers
    from rich.console import Console

    from ..measure import PeakMemory
    from . import figure, report, results, resume, runner, text, verdicts

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args.device = device(args.device)
    console = Console(highlight=False)
    with console.status(f"loading {args.model or 'a small GPT-2'}"):
        task = text.load(args)
    for contender in chosen:  # refuse bad strengths before the first minute of training, not after it
        try:
            runner.Run(contender, task, args, args.seed)
        except ValueError as error:
            option = "--with" if contender.recipe is None else "--recipe"
            raise UsageError(f"{option} {contender.label}: {error}") from None
    try:
        heading = report.heading(task, args)
    except RuntimeError as error:
        raise UsageError(f"FASTREG_BACKEND: {error}") from None
    arguments = resume.saved_arguments(args, task, chosen)
    if args.resume is not None:
        run_file.check(arguments)
    else:
        run_file = resume.RunFile.create(folder(args.out, "compare"), arguments)
    out = run_file.path.parent
    console.print(heading, soft_wrap=True)
    interrupted = _train_all(chosen, task, args, run_file, console)
    outcome = results.by_label(run_file.records)
    report.write_json(out / "compare.json", outcome, task, args, interrupted)
    figure.draw(out / "compare.png", outcome, verdicts.headline(outcome))
    if not interrupted:
        run_file.remove()  # not before the results are written, which may fail
    report.show(console, outcome, PeakMemory(args.device).method)
    console.print(f"\n[bold]{out / 'compare.png'}[/]  {out / 'compare.json'}", soft_wrap=True)
    if interrupted:
        note = f"interrupted: what was done until then is kept; fastreg compare --resume {out} goes on"
        console.print(note, soft_wrap=True)
    return 130 if interrupted else 0


def _train_all(chosen: Any, task: Any, args: argparse.Namespace, run_file: RunFile, console: Any) -> bool:
    """Trains one contender after the other; returns whether Ctrl-C ended it."""
    from rich import progress

    from .results import Record
    from .runner import train

    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(28), progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(), progress.TextColumn("{task.fields[losses]}"),
    )  # fmt: skip
    runs = [(contender, args.seed + i) for i in range(args.seeds) for contender in chosen]
    names = [c.label + (f" (seed {seed})" if args.seeds > 1 else "") for c, seed in runs]
    width = max(map(len, names))
    records = run_file.records
    done = sum(record.finished for record in records)
    run_file.write(run_file.state)
    with progress.Progress(*columns, console=console) as bars:
        for name, (contender, seed) in list(zip(names, runs, strict=True))[done:]:
            state, run_file.state = run_file.state, None
            if state is None:
                records.append(Record(contender.label, contender.summary, seed))
            step = 0 if state is None else records[-1].steps[-1]
            bar = bars.add_task(name.ljust(width), total=args.steps, completed=step, losses="")

            def advance(record: Record, step: int, bar: Any = bar) -> None:
                losses = f"train {record.train[-1]:.2f}  validation {record.validation[-1]:.2f}"
                bars.update(bar, completed=step, losses=losses)

            try:
                train(contender, task, args, records[-1], advance, run_file.write, state)
                run_file.write()
            except KeyboardInterrupt:
                if not records[-1].steps:
                    records.pop()
                return True
    return False
