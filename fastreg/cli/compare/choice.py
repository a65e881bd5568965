"""Finds the contenders that `--with` and `--recipe` ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...recipe import Regularization
from ..usage import UsageError, require
from .contenders import ALIASES, ENTRIES, Entry
from .setup import Setup


@dataclass(frozen=True)
class Contender:
    """A combination of entries, as `--with` asks for it, or a recipe, as `--recipe` does."""

    label: str
    parts: tuple[tuple[Entry, float | None], ...] = ()  # with their strengths
    recipe: Regularization | None = None  # its weight decay replaces `--weight-decay`

    @property
    def summary(self) -> str:
        """Sentences on all parts, with their strengths."""
        if self.recipe is None:
            return "; ".join(entry.describe(strength) for entry, strength in self.parts)
        return "; ".join(" ".join(line.split()) for line in self.recipe.describe().splitlines())

    def apply(self, setup: Setup) -> None:
        """Edits the setup of a run; raises `ValueError` if two entries contradict each other."""
        setup.recipe = self.recipe
        for entry, strength in self.parts:
            entry.apply(setup, strength)


def choose(names: str, paths: Sequence[str]) -> list[Contender]:
    """Returns all contenders: those of `parse`, and one named after each file of a recipe in YAML.

    Raises `UsageError` for names and recipes that cannot be used, and for labels that occur twice.
    """
    chosen = parse(names)
    if paths:
        require("compare --recipe", "cli", "yaml")
    for path in paths:
        label = Path(path).stem
        try:
            recipe = Regularization.from_yaml(path)
        except OSError as error:
            raise UsageError(f"--recipe {path}: {error.strerror}") from None
        except ValueError as error:
            raise UsageError(f"--recipe {error}") from None
        if any(contender.label == label for contender in chosen):
            raise UsageError(
                f"--recipe {path}: there is another contender {label!r}; the file's name is the label: "
                "rename it"
            )
        chosen.append(Contender(label, recipe=recipe))
    return chosen


def parse(text: str) -> list[Contender]:
    """Returns the contenders that a text such as `"plain,ema,clip=0.5+noise=1e-3"` asks for.

    Raises `UsageError` for unknown names, strengths that are not numbers, and labels that occur twice.
    """
    labels = [label.strip() for label in text.split(",") if label.strip()]
    if not labels:
        raise UsageError(f"--with names no contender, got {text!r}; for example --with plain,ema")
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"--with names {label!r} twice; give each contender once")
    return [Contender(label, tuple(map(_part, _expand(label).split("+")))) for label in labels]


def _expand(label: str) -> str:
    return "+".join(ALIASES.get(name, name) for name in map(str.strip, label.split("+")))


def _part(text: str) -> tuple[Entry, float | None]:
    name, equals, strength = (word.strip() for word in text.partition("="))
    if name not in ENTRIES:
        known = ", ".join((*ENTRIES, *ALIASES))
        raise UsageError(f"--with: unknown contender {name!r}; choose from {known}")
    entry = ENTRIES[name]
    if not equals:
        return entry, entry.strength
    if entry.strength is None:
        raise UsageError(f"--with: {name!r} takes no strength, got {text!r}")
    try:
        return entry, float(strength)
    except ValueError:
        raise UsageError(
            f"--with: the strength in {text!r} is not a number; for example {name}={entry.strength:g}"
        ) from None


def list_contenders() -> str:
    """Returns all contenders with what they do, one a line."""
    lines = [(entry.name, entry.describe(entry.strength)) for entry in ENTRIES.values()]
    return "\n".join(f"{name:<12}{summary}" for name, summary in [*lines, *ALIASES.items()])
