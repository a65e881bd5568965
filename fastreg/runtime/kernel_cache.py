"""Triton's cache as `fastreg precompile` fills it: for which targets, and whether by this very version.

`fastreg.json` in the folder of the cache says what was compiled into it, by target.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

FILE = "fastreg.json"


@dataclasses.dataclass(frozen=True)
class Cached:
    """Kernels that were compiled ahead of time.

    Attributes:
        target: Such as "sm_90".
        kernels: How many.
        current: Whether they are those of this version of fastreg and triton; others are never used.
    """

    target: str
    kernels: int
    current: bool


def folder() -> Path:
    """Where Triton keeps what it compiles."""
    given = os.environ.get("TRITON_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~")) / ".triton" / "cache"


def read(place: Path | None = None) -> list[Cached]:
    """What was compiled ahead of time into a cache, by default Triton's own."""
    known = _known((folder() if place is None else place) / FILE)
    return [Cached(target, len(hashes), version == identity()) for target, (hashes, version) in known.items()]


def note(place: Path, target: str, hashes: set[str]) -> None:
    """Write down that these kernels have been compiled into a cache for a target, beside earlier ones."""
    known = _known(place / FILE)
    before, version = known.get(target, (set(), ""))
    known[target] = (hashes | before if version == identity() else hashes), identity()
    rows = {name: {"version": version, "kernels": sorted(found)} for name, (found, version) in known.items()}
    made = place / f".{FILE}.{os.getpid()}"
    made.write_text(json.dumps(rows, indent=1) + "\n")
    made.replace(place / FILE)


def _known(file: Path) -> dict[str, tuple[set[str], str]]:
    """Hashes of kernels, and version, by target."""
    try:
        rows = json.loads(file.read_text())
        return {target: (set(row["kernels"]), str(row["version"])) for target, row in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


@functools.cache
def identity() -> str:
    """A digest of triton's version and of all sources that say what is compiled."""
    digest = hashlib.sha256(_version("triton").encode())
    for package in ("fastreg_kernels", "fastreg"):
        spec = find_spec(package)
        for root in sorted(spec.submodule_search_locations or ()) if spec else ():
            for file in sorted(Path(root).rglob("*.py")):
                digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
