"""The command line: `fastreg compare | private | bench | recipe | precompile | info`.

Each subcommand is a module with `add_parser`. It imports transformers, matplotlib and rich only when it runs,
so that help and usage errors come at once.
"""

import sys
from collections.abc import Sequence

from ..common.versions import installed_version
from . import bench, compare, info, precompile, private, recipe
from .usage import Parser, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line on some arguments.

    Args:
        argv: The arguments after the program's name; those of the process by default.

    Returns:
        The exit code: 0, 2 for a usage error (one line on stderr), 130 after Ctrl-C.
    """
    parser = Parser(prog="fastreg", description="Regularization for PyTorch, fused into Triton kernels.")
    version = installed_version("fastreg") or "(not installed)"
    parser.add_argument("--version", action="version", version=f"fastreg {version}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in (compare, private, bench, recipe, precompile, info):
        command.add_parser(commands)
    try:
        args = parser.parse_args(argv)
        if args.run is None:
            parser.print_help()
            return 0
        return args.run(args)
    except UsageError as error:
        print(f"fastreg: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastreg: interrupted", file=sys.stderr)
        return 130
