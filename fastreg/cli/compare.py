"""`fastreg compare`: train a language model with several regularizers side by side."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from . import choice, contenders
from .usage import UsageError, count, device, folder, non_negative, positive, require, whole

if TYPE_CHECKING:
    from .results import Record
    from .resume import RunFile

DESCRIPTION = """\
Train a causal language model on text with several regularizers side by side: the same initial weights, the
same batches, the same hyper-parameters but for the regularizer. Ends with a table, a verdict for each
regularizer, curves as PNG and everything as JSON. With no arguments, a small GPT-2 learns from too little
text in about three minutes on a laptop, and overfits."""


class Given(argparse.Action):
    """Stores a value, and its name among those that were given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store both."""
        setattr(namespace, self.dest, values)
        namespace.given = [*getattr(namespace, "given", ()), self.dest]


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "compare", help="train with several regularizers side by side: which helps, what does it cost",
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="contenders (combine with +, set the strength with =, as in clip=0.5+ema):\n"
        + "\n".join("  " + line for line in choice.listing().splitlines()),
    )  # fmt: skip

    def add(flag: str, metavar: str, text: str, **options: Any) -> None:
        parser.add_argument(flag, metavar=metavar, help=text, action=Given, **options)

    add(
        "--with",
        "LIST",
        "contenders, comma-separated (%(default)s)",
        dest="contenders",
        default=contenders.DEFAULT,
    )
    add(
        "--recipe",
        "FILE",
        "more contenders, each a recipe in YAML (see fastreg recipe) called after its file",
        nargs="+",
        default=[],
    )
    parser.add_argument("--list", action="store_true", help="list the contenders and exit")
    add(
        "--model",
        "NAME",
        "pre-trained causal language model: on the Hugging Face hub or a folder (small GPT-2)",
    )
    add("--text", "FILE", "text to learn from, UTF-8 (the language reference inside Python)", nargs="+")
    add("--steps", "N", "training steps (%(default)s)", type=count, default=450)
    add("--batch-size", "N", "windows in a batch (%(default)s)", type=count, default=8)
    add("--block-size", "N", "tokens in a window, at least 2 (%(default)s)", type=count, default=64)
    add("--lr", "X", "learning rate (2e-3, with --model 5e-5)", type=positive)
    add("--warmup", "N", "steps of linear warm-up (%(default)s)", type=whole, default=20)
    add("--weight-decay", "X", "of all but `decay` (%(default)s)", type=non_negative, default=0.01)
    add("--train-tokens", "N", "size of the training share (8000, with --text 90 %%)", type=count)
    add(
        "--val-tokens",
        "N",
        "size of the validation share behind it (12000, with --text the rest)",
        type=count,
    )
    add("--eval-every", "N", "steps between points of the curves (%(default)s)", type=count, default=25)
    add("--seed", "N", "seed of weights, batches and noise (%(default)s)", type=whole, default=0)
    add(
        "--seeds",
        "N",
        "train each contender with this many seeds, --seed and those after it (%(default)s)",
        type=count,
        default=1,
    )
    add("--device", "NAME", "such as cpu or cuda:1 (cuda where there is one)")
    add("--out", "DIR", "folder for the results (runs/compare-DATE-TIME)")
    add("--resume", "DIR", "go on with the interrupted run in this folder, with the same results")
    parser.set_defaults(run=run, given=())


def run(args: argparse.Namespace) -> int:
    """Run `fastreg compare`.

    Args:
        args: The parsed arguments.

    Returns:
        The exit code.

    Raises:
        UsageError: For input that cannot be used; nothing has been trained then.
    """
    if args.list:
        print(choice.listing())
        return 0
    if args.resume is not None:
        require("compare", "cli", "matplotlib", "rich", "transformers")
        from .resume import RunFile

        kept = RunFile.read(args.resume)
        kept.restore(args)
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

    from . import figure, report, results, resume, text, training, verdicts
    from .measure import PeakMemory

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args.device = device(args.device)
    console = Console()
    with console.status(f"loading {args.model or 'a small GPT-2'}"):
        task = text.load(args)
    for contender in chosen:  # refuse bad strengths before the first minute of training, not after it
        try:
            training.Run(contender, task, args, args.seed)
        except ValueError as error:
            raise UsageError(f"{contender.option} {contender.label}: {error}") from None
    try:
        heading = report.heading(task, args)
    except RuntimeError as error:
        raise UsageError(f"FASTREG_BACKEND: {error}") from None
    trained = resume.arguments(args, task, chosen)
    if args.resume is not None:
        kept.check(trained)
    else:
        kept = resume.RunFile.begun(folder(args.out, "compare"), trained)
    out = kept.path.parent
    console.print(heading, highlight=False, soft_wrap=True)
    interrupted = _train_all(chosen, task, args, kept, console)
    found = results.by_label(kept.records)
    report.write_json(out / "compare.json", found, task, args, interrupted)
    figure.draw(out / "compare.png", found, verdicts.headline(found))
    if not interrupted:
        kept.remove()  # not before the results are written, which may fail
    report.show(console, found, PeakMemory(args.device).method)
    console.print(
        f"\n[bold]{out / 'compare.png'}[/]  {out / 'compare.json'}", highlight=False, soft_wrap=True
    )
    if interrupted:
        console.print(
            f"interrupted: what was done until then is kept; fastreg compare --resume {out} goes on",
            highlight=False,
            soft_wrap=True,
        )
    return 130 if interrupted else 0


def _train_all(chosen: Any, task: Any, args: argparse.Namespace, kept: RunFile, console: Any) -> bool:
    """Train one after the other with progress bars, from where it was; whether Ctrl-C ended it."""
    from rich import progress

    from .results import Record
    from .training import train

    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(28), progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(), progress.TextColumn("{task.fields[losses]}"),
    )  # fmt: skip
    runs = [(contender, args.seed + i) for i in range(args.seeds) for contender in chosen]
    names = [c.label + (f" (seed {seed})" if args.seeds > 1 else "") for c, seed in runs]
    width = max(map(len, names))
    records = kept.records
    done = sum(record.finished for record in records)
    kept.write(records, kept.state)
    with progress.Progress(*columns, console=console) as bars:
        for name, (contender, seed) in list(zip(names, runs, strict=True))[done:]:
            state, kept.state = kept.state, None
            if state is None:
                records.append(Record(contender.label, contender.summary, seed))
            begun = 0 if state is None else records[-1].steps[-1]
            bar = bars.add_task(name.ljust(width), total=args.steps, completed=begun, losses="")

            def advance(record: Record, step: int, bar: Any = bar) -> None:
                losses = f"train {record.train[-1]:.2f}  validation {record.validation[-1]:.2f}"
                bars.update(bar, completed=step, losses=losses)

            def save(state: dict[str, Any]) -> None:
                kept.write(records, state)

            try:
                train(contender, task, args, records[-1], advance, save, state)
                kept.write(records)
            except KeyboardInterrupt:
                if not records[-1].steps:
                    records.pop()
                return True
    return False
