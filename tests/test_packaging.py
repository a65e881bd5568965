"""The wheel holds what is in the checkout, under the names that users import."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from shutil import copy, copytree, ignore_patterns

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "fastreg": ROOT / "fastreg",
    "fastreg_benchmarks": ROOT / "benchmarks",
    "fastreg_kernels": ROOT / "kernels" / "fastreg_kernels",
}


def build(hook: str, source: Path, target: Path) -> Path:
    """Build in `source` with the backend itself: no network, no isolation."""
    code = f"from setuptools import build_meta; build_meta.{hook}({str(target)!r})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = target.iterdir()
    return built


def content(wheel: Path) -> dict[str, str]:
    """The text of every file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_wheel_and_sdist_hold_the_three_packages(tmp_path: Path) -> None:
    # Built in a copy: setuptools leaves files beside the sources, and would ship stale ones it finds there.
    checkout = tmp_path / "checkout"
    for folder in ("fastreg", "kernels", "benchmarks", "tests"):
        copytree(ROOT / folder, checkout / folder, ignore=ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / file, checkout)

    wheel = content(build("build_wheel", checkout, tmp_path / "wheel"))
    expected = {
        str(PurePosixPath(name, file.relative_to(root).as_posix()))
        for name, root in SOURCES.items()
        for file in root.rglob("*.py")
    } | {"fastreg/py.typed", "fastreg_kernels/py.typed"}
    assert {name for name in wheel if ".dist-info/" not in name} == expected

    about = {name.partition(".dist-info/")[2]: text for name, text in wheel.items() if ".dist-info/" in name}
    assert about["top_level.txt"].split() == sorted(SOURCES)
    assert "fastreg = fastreg.cli:main" in about["entry_points.txt"]
    assert "Requires-Dist: triton" in about["METADATA"]
    assert "Apache License" in about["licenses/LICENSE"]

    sdist = build("build_sdist", checkout, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = content(build("build_wheel", unpacked, tmp_path / "again"))
    assert again.keys() == wheel.keys()
