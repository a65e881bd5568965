"""What `--with` and `--recipe` ask for: combinations of contenders, and recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .contenders import ALIASES, ENTRIES, Entry
from .setup import Setup
from .usage import UsageError, require

if TYPE_CHECKING:
    from ..recipe import Regularization


@dataclass(frozen=True)
class Contender:
    """A combination of entries, as asked for by `--with`."""

    option = "--with"

    label: str
    parts: tuple[tuple[Entry, float | None], ...]

    @property
    def summary(self) -> str:
        """What it does, with its strengths."""
        return "; ".join(entry.described(strength) for entry, strength in self.parts)

    def apply(self, setup: Setup) -> None:
        """Edit the setup."""
        for entry, strength in self.parts:
            entry.apply(*((setup,) if strength is None else (setup, strength)))


@dataclass(frozen=True)
class FromFile:
    """A recipe, as asked for by `--recipe`; its weight decay is its own, too."""

    label: str
    recipe: Regularization

    option = "--recipe"

    @property
    def summary(self) -> str:
        """What is on."""
        return "; ".join(" ".join(line.split()) for line in self.recipe.describe().splitlines())

    def apply(self, setup: Setup) -> None:
        """Let the recipe make the optimizer."""
        setup.make = lambda setup: self.recipe.apply(setup.model, setup.lr, setup.steps, setup.seed)


def from_files(paths: Sequence[str]) -> list[FromFile]:
    """A contender for each recipe, called after its file.

    Args:
        paths: YAML files, see `fastreg.Regularization.from_yaml`.

    Raises:
        UsageError: For files that cannot be read, and for recipes that cannot be used.
    """
    if not paths:
        return []
    require("compare --recipe", "cli", "yaml")
    from ..recipe import Regularization

    found = []
    for path in paths:
        try:
            recipe = Regularization.from_yaml(path)
        except OSError as error:
            raise UsageError(f"--recipe {path}: {error.strerror}") from None
        except ValueError as error:
            raise UsageError(f"--recipe {error}") from None
        found.append(FromFile(Path(path).stem, recipe))
    return found


def choose(names: str, paths: Sequence[str]) -> list[Contender | FromFile]:
    """All that is asked for, each under a label of its own.

    Args:
        names: See `parse`.
        paths: See `from_files`.

    Raises:
        UsageError: As these, and for recipes that go by the label of another contender.
    """
    chosen: list[Contender | FromFile] = [*parse(names), *from_files(paths)]
    labels = [contender.label for contender in chosen]
    for path in paths:
        if labels.count(Path(path).stem) > 1:
            raise UsageError(
                f"--recipe {path}: there is another contender {Path(path).stem!r}; the file's name is the "
                "label: rename it"
            )
    return chosen


def parse(text: str) -> list[Contender]:
    """Contenders from `NAME[=STRENGTH][+NAME...],...`.

    Args:
        text: Such as `"plain,ema,clip=0.5+noise=1e-3"`.

    Raises:
        UsageError: For unknown names, numbers that are none, and doublets.
    """
    labels = [label.strip() for label in text.split(",") if label.strip()]
    if not labels:
        raise UsageError(f"--with names no contender, got {text!r}; for example --with plain,ema")
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"--with names {label!r} twice; give each contender once")
    return [Contender(label, tuple(map(_part, _expanded(label).split("+")))) for label in labels]


def _expanded(label: str) -> str:
    return "+".join(ALIASES.get(name, name) for name in map(str.strip, label.split("+")))


def _part(text: str) -> tuple[Entry, float | None]:
    name, given, value = (word.strip() for word in text.partition("="))
    if name not in ENTRIES:
        known = ", ".join((*ENTRIES, *ALIASES))
        raise UsageError(f"--with: unknown contender {name!r}; choose from {known}")
    entry = ENTRIES[name]
    if not given:
        return entry, entry.strength
    if entry.strength is None:
        raise UsageError(f"--with: {name!r} takes no strength, got {text!r}")
    try:
        return entry, float(value)
    except ValueError:
        raise UsageError(
            f"--with: the strength in {text!r} is not a number; for example {name}={entry.strength:g}"
        ) from None


def listing() -> str:
    """All contenders and what they do, one a line."""
    lines = [
        (entry.name, Contender(entry.name, ((entry, entry.strength),)).summary) for entry in ENTRIES.values()
    ]
    lines += ALIASES.items()
    return "\n".join(f"{name:<12}{summary}" for name, summary in lines)
