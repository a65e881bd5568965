"""Runs `fastreg precompile`: compiles kernels into Triton's cache without a GPU."""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .usage import UsageError, count, require

DESCRIPTION = """\
Compile the kernels that fastreg ships into Triton's cache, for a container image or for a machine whose GPU
time is short. No GPU is needed. A run finds them where fastreg, triton and Python have the same versions, in
the folder that --out names: set TRITON_CACHE_DIR to it, or leave --out away. The folder must keep its path,
because Triton stores paths in it; and for its own launchers, Triton still needs a C compiler where it runs.
All kernels take about a minute on two cores and 18 MB for each target; --only takes those of some chains."""


def add_parser(commands: Any) -> None:
    """Adds the subcommand `precompile` to the command line."""
    summary = "compile kernels ahead of time, without a GPU"
    parser = commands.add_parser("precompile", help=summary, description=DESCRIPTION)
    options: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
        ("--target", "ARCH", "such as sm_90, once for each (default: that of the GPU here)",
         {"action": "append"}),
        ("--out", "FOLDER", "the cache (default: Triton's own)", {}),
        ("--only", "NAME,...",
         "chains such as AdamW or clip+AdamW+EMA, and kernels such as dropout (default: all; see --list)",
         {}),
        ("--dtype", "KIND,...",
         "of fp32, bf16, fp16, and for chains mixed and remainder (default: all but fp16)", {}),
        ("--jobs", "JOBS", "processes (default: one for each core)",
         {"type": count, "default": os.cpu_count() or 1}),
        ("--features", "N,...",
         "sizes of the last dimension, for dropout with a bias (default: 768,1024,4096)", {}),
    )  # fmt: skip
    for flag, metavar, text, more in options:
        parser.add_argument(flag, metavar=metavar, help=text, **more)
    parser.add_argument("--list", action="store_true", help="list the names and exit")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compiles the kernels that the arguments name."""
    if args.list:
        from fastreg_benchmarks.families import FAMILIES

        print("\n".join(FAMILIES))
        return 0
    require("precompile", "cli", "triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("TRITON_INTERPRET=1 interprets kernels: unset it to compile them")
    from fastreg.runtime import kernel_cache
    from fastreg_benchmarks import precompile, stub

    targets = args.target or [_here()]
    for target in targets:
        try:
            stub.gpu_target(target)
        except ValueError as error:
            raise UsageError(f"--target: {error}") from None
    work = precompile.items(_names(args.only), _kinds(args.dtype), _features(args.features))
    if not work:
        raise UsageError("there is nothing to compile: none of these names has kernels of these dtypes")
    if args.out == "":
        raise UsageError("--out names no folder")
    cache = (Path(args.out) if args.out else kernel_cache.folder()).absolute()  # Triton stores paths
    status = 0
    for target in targets:
        done = iter(range(1, len(work) + 1))

        def report(item: Any, kernels: int, target: str = target, done: Iterator[int] = done) -> None:
            if sys.stdout.isatty():
                print(f"\r{target}  {next(done)}/{len(work)}  {item!s:<44}", end="", flush=True)

        try:
            filled = precompile.fill(target, cache, work, args.jobs, report)
        except OSError as error:
            raise UsageError(f"{cache} cannot be written ({error.strerror}): name another --out") from None
        counts = f"{filled.kernels} kernels in {cache}, {filled.compiled} of them new"
        line = f"{target}: {counts}, {filled.seconds:.0f} s"
        print(f"\r{line:<70}" if sys.stdout.isatty() else line)
        for item, why in filled.failed.items():
            print(f"  {item} did not compile: {why}")
            status = 1
    return status


def _here() -> str:
    import torch

    from fastreg.runtime import device

    if not torch.cuda.is_available():
        raise UsageError("there is no GPU here: name a target, for example --target sm_90")
    return device.architecture(torch.device("cuda", torch.cuda.current_device())).name


def _split(option: str, argument: str | None, example: str) -> list[str]:
    parts = [part.strip() for part in (argument or "").split(",") if part.strip()]
    if argument is not None and not parts:
        raise UsageError(f"{option} names nothing, got {argument!r}; for example {option} {example}")
    return parts


def _names(argument: str | None) -> list[str]:
    from fastreg_benchmarks.chains import known
    from fastreg_benchmarks.families import FAMILIES

    names = _split("--only", argument, "AdamW,dropout")
    if unknown := [name for name in names if name not in FAMILIES and not known(name)]:
        raise UsageError(
            f"--only: unknown name {unknown[0]!r}; --list shows the names, and parts may be combined with a "
            "rule, as in EMA+SGD"
        )
    return names


def _features(argument: str | None) -> list[int]:
    from fastreg_benchmarks.precompile import FEATURES

    try:
        return [count(number) for number in _split("--features", argument, "768,1024")] or list(FEATURES)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--features: {error}; for example --features 768,1024") from None


def _kinds(argument: str | None) -> list[str]:
    from fastreg_benchmarks.chains import STORAGES
    from fastreg_benchmarks.precompile import DTYPES, KINDS

    kinds, known = _split("--dtype", argument, "fp32,bf16"), dict.fromkeys((*DTYPES, *STORAGES))
    if unknown := [kind for kind in kinds if kind not in known]:
        raise UsageError(f"--dtype: unknown dtype {unknown[0]!r}; choose from {', '.join(known)}")
    return kinds or list(KINDS)
