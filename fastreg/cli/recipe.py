"""Runs `fastreg recipe`: prints a commented recipe to start from."""

import argparse
from typing import Any

DESCRIPTION = """\
Print a recipe in YAML with every setting and what it does: `fastreg recipe > my.yaml`. Settings
that are not to be on stay comments. Use it in `fastreg compare --recipe my.yaml`, or with
`fastreg.Regularization.from_yaml("my.yaml").apply(model, lr=...)`."""

ON = {
    "optimizer": ("name",), "weight_decay": ("rate",), "dropout": ("rate",), "clip": ("max_norm",),
    "ema": ("decay",),
}  # fmt: skip
"""The settings that are printed without a comment sign."""


def add_parser(commands: Any) -> None:
    """Adds the subcommand `recipe` to the command line."""
    summary = "print a commented recipe in YAML, for compare --recipe"
    parser = commands.add_parser("recipe", help=summary, description=DESCRIPTION)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints a recipe with all settings."""
    print(template(), end="")
    return 0


def template() -> str:
    """Returns a recipe in YAML with all settings and what they do, most of them commented out."""
    from ..recipe.sections import SECTIONS

    lines = [
        "# A recipe for fastreg: all that regularizes a training run. Sections that are left out are off.",
        "# Remove the '# ' before a section and the settings you want. Shorter forms: clip: 1.0, ema: true.",
        "# All values are the defaults.",
    ]
    for name, section in SECTIONS.items():
        on = ON.get(name, ())
        lines += ["", f"# {section.text}", f"{'' if on else '# '}{name}:"]
        for key, setting in section.keys.items():
            line = f"{'' if key in on else '# '}  {key}: {_flow(setting.example)}"
            lines.append(f"{line:<32} # {setting.text}")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
