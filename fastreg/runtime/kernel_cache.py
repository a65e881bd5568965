"""Reads and writes the list of kernels that `fastreg precompile` compiled into Triton's cache.

The list is `fastreg.json` in the folder of the cache: kernels and versions by target.
"""

import dataclasses
import functools
import hashlib
import json
import os
from importlib.util import find_spec
from pathlib import Path

from ..common.versions import installed_version

FILE = "fastreg.json"


@dataclasses.dataclass(frozen=True)
class Cached:
    """Kernels that were compiled ahead of time for a target such as "sm_90"."""

    target: str
    kernels: int  # how many
    current: bool  # whether this version of fastreg and triton compiled them; others are never used


def folder() -> Path:
    """Returns the folder of Triton's cache."""
    if setting := os.environ.get("TRITON_CACHE_DIR"):
        return Path(setting)
    return Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~")) / ".triton" / "cache"


def read(cache: Path) -> list[Cached]:
    """Returns the kernels compiled ahead of time into a cache."""
    known = _known(cache / FILE).items()
    return [Cached(target, len(hashes), version == identity()) for target, (hashes, version) in known]


def add(cache: Path, target: str, hashes: set[str]) -> None:
    """Adds kernels that were compiled for a target to the list of a cache."""
    known = _known(cache / FILE)
    before, version = known.get(target, (set(), ""))
    known[target] = (hashes | before if version == identity() else hashes), identity()
    rows = {name: {"version": saved, "kernels": sorted(keys)} for name, (keys, saved) in known.items()}
    new = cache / f".{FILE}.{os.getpid()}"
    new.write_text(json.dumps(rows, indent=1) + "\n")
    new.replace(cache / FILE)


def _known(file: Path) -> dict[str, tuple[set[str], str]]:
    """Returns hashes of kernels, and the version, by target."""
    try:
        rows = json.loads(file.read_text())
        return {target: (set(row["kernels"]), str(row["version"])) for target, row in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


@functools.cache
def identity() -> str:
    """Returns a digest of triton's version and of all sources that determine the kernels."""
    digest = hashlib.sha256((installed_version("triton") or "").encode())
    for package in ("fastreg_kernels", "fastreg"):
        spec = find_spec(package)
        for root in sorted(spec.submodule_search_locations or ()) if spec else ():
            for file in sorted(Path(root).rglob("*.py")):
                digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()
