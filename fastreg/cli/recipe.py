"""`fastreg recipe`: a commented recipe to start from."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

DESCRIPTION = """\
Print a recipe in YAML with every setting and what it does: `fastreg recipe > my.yaml`. What is not to be on
stays a comment. Use it in `fastreg compare --recipe my.yaml`, or with
`fastreg.Regularization.from_yaml("my.yaml").apply(model, lr=...)`."""

ON = {
    "optimizer": ("name",), "weight_decay": ("rate",), "dropout": ("rate", "inject"), "clip": ("max_norm",),
    "ema": ("decay", "warmup"),
}  # fmt: skip
"""What is no comment."""


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "recipe", help="print a commented recipe in YAML, for compare --recipe",
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print it."""
    print(template(), end="")
    return 0


def template() -> str:
    """A recipe in YAML with every setting and what it does; most of it is commented out."""
    from ..recipe.sections import SECTIONS

    lines = [
        "# A recipe for fastreg: all that regularizes a training run. What is not named is off.",
        "# Remove the '# ' before a section and the settings you want. Shorter forms: clip: 1.0, ema: true.",
    ]
    for name, section in SECTIONS.items():
        on = ON.get(name, ())
        lines += ["", f"# {section.text}", f"{'' if on else '# '}{name}:"]
        for key, setting in section.keys.items():
            given = f"{'' if key in on else '# '}  {key}: {_flow(setting.example)}"
            lines.append(f"{given:<32} # {setting.text}")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
