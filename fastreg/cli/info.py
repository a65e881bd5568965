"""Runs `fastreg info`: prints versions, devices and backends, for a bug report."""

import argparse
import dataclasses
import json
from typing import Any


def add_parser(commands: Any) -> None:
    """Adds the subcommand `info` to the command line."""
    parser = commands.add_parser(
        "info", help="versions, devices, and which backend runs where",
        description="Print versions, devices, and which backend runs an optimizer step on each and why.",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints versions, devices and backends."""
    from ..runtime.environment import info

    environment = info()
    print(json.dumps(dataclasses.asdict(environment), indent=2) if args.json else environment)
    return 0
