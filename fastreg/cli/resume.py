"""What an interrupted `fastreg compare` needs to go on: one file in its folder, gone when the run is done."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .results import Record
from .text import Task
from .usage import UsageError

NAME = "resume.pt"
APART = ("run", "list", "resume", "given", "out")
"""Arguments that do not say what is trained."""


class RunFile:
    """Records and, of the run that is not finished, the state at its latest evaluation.

    The file is written anew as a whole: whatever interrupts, the former or the new one is there.  It holds
    tensors, numbers, strings, lists and dicts, so that it loads with `weights_only=True`.

    Args:
        folder: Of the results.
        arguments: What is trained, see `arguments`.

    Attributes:
        records: Those of the runs that were begun; only the last may be unfinished.
        state: Of that one, see `training.train`.
    """

    def __init__(self, folder: Path, arguments: dict[str, Any]) -> None:
        self.path, self.arguments = folder / NAME, arguments
        self.records: list[Record] = []
        self.state: dict[str, Any] | None = None

    @classmethod
    def begun(cls, folder: Path, arguments: dict[str, Any]) -> RunFile:
        """That of a new run.

        Raises:
            UsageError: If the folder holds an interrupted run, which would be lost.
        """
        if (folder / NAME).exists():
            raise UsageError(
                f"--out {folder}: holds an interrupted run; go on with it by --resume {folder}, or remove "
                f"{folder / NAME}"
            )
        return cls(folder, arguments)

    @classmethod
    def read(cls, folder: str) -> RunFile:
        """That of an interrupted run.

        Raises:
            UsageError: If there is none.
        """
        path = Path(folder) / NAME
        if not path.exists():
            raise UsageError(f"--resume {folder}: holds no interrupted run (there is no {NAME})")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            found = cls(Path(folder), saved["arguments"])
            found.records = [Record(**record) for record in saved["records"]]
            found.state = saved["state"]
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise UsageError(f"--resume {folder}: {NAME} cannot be read: {first}") from None
        return found

    def write(self, records: Sequence[Record], state: dict[str, Any] | None = None) -> None:
        """Keep what there is, in the place of what was kept."""
        contents = {
            "arguments": self.arguments,
            "records": [dataclasses.asdict(record) for record in records],
            "state": state,
        }
        new = self.path.with_name(f"{NAME}.new")
        try:
            torch.save(contents, new)
            os.replace(new, self.path)
        finally:
            new.unlink(missing_ok=True)

    def remove(self) -> None:
        """The run is done."""
        self.path.unlink(missing_ok=True)

    def restore(self, args: argparse.Namespace) -> None:
        """Set the arguments to those of the interrupted run.

        Raises:
            UsageError: If others were given.
        """
        for name in args.given:
            flag = "--" + {"contenders": "with"}.get(name, name).replace("_", "-")
            if name == "out":
                raise UsageError(f"--out goes without --resume, which writes into {args.resume}")
            if name != "resume" and plain(getattr(args, name)) != self.arguments[name]:
                raise UsageError(
                    f"--resume {args.resume}: that run has {flag} {told(self.arguments[name])}, got {flag} "
                    f"{told(getattr(args, name))}; leave {flag} out, or start another run"
                )
        for name, value in self.arguments.items():
            if hasattr(args, name):
                setattr(args, name, value)

    def check(self, arguments: dict[str, Any]) -> None:
        """Compare with what would be trained now.

        Raises:
            UsageError: If a file or the model is another than it was.
        """
        for name, value in arguments.items():
            if self.arguments.get(name) != value:
                what = {"recipes": "a recipe", "tokens": "the text", "weights": "the model"}.get(name, name)
                raise UsageError(
                    f"--resume {self.path.parent}: {what} is not what it was; put it back, or start anew"
                )


def arguments(args: argparse.Namespace, task: Task, chosen: Sequence[Any]) -> dict[str, Any]:
    """What is trained: the arguments, and what the files they name hold."""
    recipes = {c.label: c.recipe.to_dict() for c in chosen if hasattr(c, "recipe")}
    digest = hashlib.sha256()
    for tensor in (*task.model.parameters(), *task.model.buffers()):
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    tokens = hashlib.sha256(torch.cat([task.train, task.validation.flatten()]).numpy().data).hexdigest()
    given = {name: plain(value) for name, value in vars(args).items() if name not in APART}
    return {**given, "recipes": recipes, "tokens": tokens, "weights": digest.hexdigest()}


def plain(value: Any) -> Any:
    """An argument as it is saved."""
    return str(value) if isinstance(value, torch.device) else value


def told(value: Any) -> str:
    """An argument as it is given."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
