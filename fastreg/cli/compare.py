"""`fastreg compare`: train a language model with several regularizers side by side."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from . import contenders
from .usage import UsageError, count, device, folder, non_negative, positive, require, whole

if TYPE_CHECKING:
    from .training import Record

DESCRIPTION = """\
Train a causal language model on text with several regularizers side by side: the same initial weights, the
same batches, the same hyper-parameters but for the regularizer. Ends with a table, a verdict for each
regularizer, curves as PNG and everything as JSON. With no arguments, a small GPT-2 learns from too little
text in about three minutes on a laptop, and overfits."""


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "compare", help="train with several regularizers side by side: which helps, what does it cost",
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="contenders (combine with +, set the strength with =, as in clip=0.5+ema):\n"
        + "\n".join("  " + line for line in contenders.listing().splitlines()),
    )  # fmt: skip

    def add(flag: str, metavar: str, text: str, **options: Any) -> None:
        parser.add_argument(flag, metavar=metavar, help=text, **options)

    add(
        "--with",
        "LIST",
        "contenders, comma-separated (%(default)s)",
        dest="contenders",
        default=contenders.DEFAULT,
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
    add("--device", "NAME", "such as cpu or cuda:1 (cuda where there is one)")
    add("--out", "DIR", "folder for the results (runs/compare-DATE-TIME)")
    parser.set_defaults(run=run)


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
        print(contenders.listing())
        return 0
    chosen = contenders.parse(args.contenders)
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

    from . import figure, report, text, training

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args.device = device(args.device)
    console = Console()
    with console.status(f"loading {args.model or 'a small GPT-2'}"):
        task = text.load(args)
    for contender in chosen:  # refuse bad strengths before the first minute of training, not after it
        try:
            training.set_up(contender, task.model, args)
        except ValueError as error:
            raise UsageError(f"--with {contender.label}: {error}") from None
    try:
        heading = report.heading(task, args)
    except RuntimeError as error:
        raise UsageError(f"FASTREG_BACKEND: {error}") from None
    out = folder(args.out, "compare")
    console.print(heading, highlight=False, soft_wrap=True)
    records: list[Record] = []
    interrupted = _train_all(chosen, task, args, records, console)
    report.write_json(out / "compare.json", records, task, args, interrupted)
    figure.draw(out / "compare.png", records, report.headline(records))
    report.show(console, records, training.PeakMemory(args.device).method)
    console.print(
        f"\n[bold]{out / 'compare.png'}[/]  {out / 'compare.json'}", highlight=False, soft_wrap=True
    )
    if interrupted:
        console.print("interrupted: what was done until then is kept", highlight=False)
    return 130 if interrupted else 0


def _train_all(chosen: Any, task: Any, args: argparse.Namespace, records: list[Record], console: Any) -> bool:
    """Train one after the other with progress bars; whether Ctrl-C ended it."""
    from rich import progress

    from .training import Record, train

    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(28), progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(), progress.TextColumn("{task.fields[losses]}"),
    )  # fmt: skip
    width = max(len(contender.label) for contender in chosen)
    with progress.Progress(*columns, console=console) as bars:
        for contender in chosen:
            bar = bars.add_task(contender.label.ljust(width), total=args.steps, losses="")
            records.append(Record(contender.label, contender.summary))

            def advance(record: Record, step: int, bar: Any = bar) -> None:
                losses = f"train {record.train[-1]:.2f}  validation {record.validation[-1]:.2f}"
                bars.update(bar, completed=step, losses=losses)

            try:
                train(contender, task, args, records[-1], advance)
            except KeyboardInterrupt:
                if not records[-1].steps:
                    records.pop()
                return True
    return False
