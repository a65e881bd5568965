"""Keeps the file with which an interrupted `fastreg compare` goes on; it is removed when the run is done."""

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

from ..usage import UsageError
from .choice import Contender
from .results import Record
from .text import Task

NAME = "resume.pt"
NOT_SAVED = ("run", "list", "resume", "explicit", "out")
"""Arguments that do not say what is trained."""


@dataclasses.dataclass
class RunFile:
    """The records of all runs, and the state of the unfinished run at its latest evaluation.

    The file is replaced as a whole: whatever interrupts, the previous or the new one exists. It holds
    tensors, numbers, strings, lists and dicts, so that it loads with `weights_only=True`.
    """

    path: Path
    arguments: dict[str, Any]  # what is trained, see `saved_arguments`
    records: list[Record] = dataclasses.field(default_factory=list)  # only the last may be unfinished
    state: dict[str, Any] | None = None  # of the unfinished run, see `runner.train`

    @classmethod
    def create(cls, folder: Path, arguments: dict[str, Any]) -> RunFile:
        """Returns the file of a new run, which is not written yet.

        Raises `UsageError` if the folder holds an interrupted run, which would be lost.
        """
        if (folder / NAME).exists():
            raise UsageError(
                f"--out {folder}: holds an interrupted run; go on with it by --resume {folder}, or remove "
                f"{folder / NAME}"
            )
        return cls(folder / NAME, arguments)

    @classmethod
    def read(cls, folder: str) -> RunFile:
        """Returns the file of an interrupted run; raises `UsageError` if it is not there or damaged."""
        path = Path(folder) / NAME
        if not path.exists():
            raise UsageError(f"--resume {folder}: holds no interrupted run (there is no {NAME})")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            records = [Record(**record) for record in saved["records"]]
            return cls(path, saved["arguments"], records, saved["state"])
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise UsageError(f"--resume {folder}: {NAME} cannot be read: {first}") from None

    def write(self, state: dict[str, Any] | None = None) -> None:
        """Replaces the file by one with the records as they are now, and a state."""
        records = [dataclasses.asdict(record) for record in self.records]
        contents = {"arguments": self.arguments, "records": records, "state": state}
        new = self.path.with_name(f"{NAME}.new")
        try:
            torch.save(contents, new)
            os.replace(new, self.path)
        finally:
            new.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes the file, when the comparison is done."""
        self.path.unlink(missing_ok=True)

    def restore_arguments(self, args: argparse.Namespace) -> None:
        """Sets the arguments to those of the interrupted run; raises `UsageError` if others were given."""
        for name in args.explicit:
            flag = "--" + {"contenders": "with"}.get(name, name).replace("_", "-")
            if name == "out":
                raise UsageError(f"--out goes without --resume, which writes into {args.resume}")
            if name != "resume" and _plain(getattr(args, name)) != self.arguments[name]:
                raise UsageError(
                    f"--resume {args.resume}: that run has {flag} {format_value(self.arguments[name])}, "
                    f"got {flag} {format_value(getattr(args, name))}; leave {flag} out, or start another run"
                )
        for name, value in self.arguments.items():
            if hasattr(args, name):
                setattr(args, name, value)

    def check(self, arguments: dict[str, Any]) -> None:
        """Raises `UsageError` if a recipe, the text or the model is not what it was."""
        for name, value in arguments.items():
            if self.arguments.get(name) != value:
                what = {"recipes": "a recipe", "tokens": "the text", "weights": "the model"}.get(name, name)
                raise UsageError(
                    f"--resume {self.path.parent}: {what} is not what it was; put it back, or start anew"
                )


def saved_arguments(args: argparse.Namespace, task: Task, chosen: Sequence[Contender]) -> dict[str, Any]:
    """Returns what is trained: the arguments, and the contents of the files that they name."""
    recipes = {c.label: c.recipe.to_dict() for c in chosen if c.recipe is not None}
    digest = hashlib.sha256()
    for tensor in (*task.model.parameters(), *task.model.buffers()):
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    tokens = hashlib.sha256(torch.cat([task.train, task.validation.flatten()]).numpy().data).hexdigest()
    settings = {name: _plain(value) for name, value in vars(args).items() if name not in NOT_SAVED}
    return {**settings, "recipes": recipes, "tokens": tokens, "weights": digest.hexdigest()}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, torch.device) else value


def format_value(value: Any) -> str:
    """Returns an argument as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
