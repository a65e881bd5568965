"""The wheel holds what is in the checkout, under the names that users import."""

import ast
import json
import re
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
    } | {"fastreg/py.typed", "fastreg_kernels/py.typed", "fastreg_benchmarks/libcuda.c"}
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


def test_the_oldest_versions_that_are_tested_are_those_that_are_allowed() -> None:
    allowed = dict(re.findall(r"\b([a-z]+)>=(\d[\d.]*)", (ROOT / "pyproject.toml").read_text()))
    (oldest,) = (
        ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "noxfile.py").read_text()).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "OLDEST"
    )
    for name in ("torch", "triton", "transformers"):
        assert oldest[name].startswith(f"{allowed[name]}."), name


def test_each_session_has_recorded_that_all_tests_pass() -> None:
    """Of the versions that it is about."""
    records = {
        file.stem: json.loads(file.read_text())
        for file in (ROOT / "benchmarks/results/versions").glob("*.json")
    }
    assert records.keys() == {"oldest", "pinned", "newest"}
    for record in records.values():
        assert record["tests"]["passed"] > 5000 and record["machine code"]["passed"] > 300
        assert record["tests"]["failed"] == record["machine code"]["failed"] == 0
    pins = dict(re.findall(r"^([a-z]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    assert records["pinned"]["versions"]["torch"].startswith(pins["torch"])
    assert records["oldest"]["versions"]["torch"].startswith("2.11.")
