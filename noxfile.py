"""The same tests on the oldest, the pinned and the newest versions that fastreg supports.

    nox -s oldest                        one of the sessions
    nox -s oldest -- tests/kernels -x    some tests, without a record of the result
    nox -s newest --force-python 3.12    another Python

Each installs into an environment of its own under .nox; torch from PyPI is a CUDA build of several GB that
runs on a CPU, too.  The record goes to benchmarks/results/versions, whence `make render` makes a table.
"""

import json
import xml.etree.ElementTree
from pathlib import Path

import nox

nox.options.sessions = ["pinned"]
nox.options.reuse_existing_virtualenvs = True

OLDEST = {
    "torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0", "accelerate": "1.15.0", "numpy": "2.2.6",
}  # fmt: skip
"""The floors of pyproject.toml; and numpy, since Triton 3.6 interprets with numpy before 2.3 alone."""
FOLLOWING = (
    "contourpy", "cuda-", "huggingface-hub", "matplotlib", "nvidia-", "peft", "safetensors", "scikit-learn",
    "scipy", "setuptools", "tokenizers",
)  # fmt: skip
"""Packages whose pinned versions belong to the pinned versions of others."""
PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy")
RECORDS = Path("benchmarks/results/versions")
ABOUT_RECORDS = (
    "tests/test_packaging.py::test_each_session_has_recorded_that_all_tests_pass",
    "tests/benchmarks/test_render.py::test_the_readmes_are_up_to_date",
)
"""Tests of what is written only once the sessions have ended."""


@nox.session
def oldest(session: nox.Session) -> None:
    """The oldest versions that pyproject.toml allows."""
    check(session, "oldest", constraints(session, OLDEST, (*OLDEST, *FOLLOWING)))


@nox.session
def pinned(session: nox.Session) -> None:
    """The versions of constraints.txt, which `make test` installs."""
    check(session, "pinned", "constraints.txt")


@nox.session
def newest(session: nox.Session) -> None:
    """The newest torch, triton, transformers and numpy that there are, whenever it was installed first."""
    check(session, "newest", constraints(session, {}, (*OLDEST, *FOLLOWING)), "--upgrade")


def constraints(session: nox.Session, pins: dict[str, str], without: tuple[str, ...]) -> str:
    """Writes constraints.txt with other pins, and without some of its own."""
    lines = Path("constraints.txt").read_text().splitlines()
    groups = tuple(name for name in without if name.endswith("-"))
    names = [line.partition("==")[0] for line in lines]
    kept = [
        line for line, name in zip(lines, names, strict=True)
        if name not in without and not name.startswith(groups)
    ]  # fmt: skip
    file = Path(session.create_tmp()) / "constraints.txt"
    file.write_text("\n".join([*kept, *(f"{name}=={version}" for name, version in pins.items())]) + "\n")
    return str(file)


def check(session: nox.Session, label: str, versions: str, *how: str) -> None:
    """Installs, runs all tests, slow ones too, and records how many have passed."""
    session.install("--constraint", versions, "setuptools")
    session.install("--constraint", versions, "--no-build-isolation", *how, "--editable", ".[dev]")
    if session.posargs:
        session.run("pytest", *session.posargs)
        return
    if not (packages := installed(session)):  # --install-only
        return
    record = {"session": label, "versions": packages}
    parts = {"tests": ["tests", "--ignore=tests/benchmarks"], "machine code": ["tests/benchmarks"]}
    deselected = [word for test in ABOUT_RECORDS for word in ("--deselect", test)]
    for name, arguments in parts.items():
        report = str(Path(session.create_tmp()) / f"{name}.xml")
        command = ["pytest", "-q", "-n", "2", "--junitxml", report, *deselected, *arguments]
        session.run(*command, success_codes=[0, 1])
        record[name] = counts(Path(report))
        if record[name]["failed"]:
            session.run(*command, "--last-failed", success_codes=[0, 1])
            record[name] = second_attempt(record[name], counts(Path(report))["failed"])
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / f"{label}.json").write_text(json.dumps(record, indent=1) + "\n")
    session.log(json.dumps(record))
    if failed := sum(record[name]["failed"] for name in parts):
        session.error(f"{failed} tests have failed")


def installed(session: nox.Session) -> dict[str, str]:
    """Returns the versions that the tests run with; nothing if nox runs nothing."""
    code = "import importlib.metadata as m, platform; print(platform.python_version(), *map(m.version, "
    code += f"{PACKAGES!r}))"
    output = session.run("python", "-c", code, silent=True)
    return dict(zip(("python", *PACKAGES), output.split(), strict=True)) if isinstance(output, str) else {}


def second_attempt(first: dict[str, int], failed: int) -> dict[str, int]:
    """Returns the counts after failed tests were run again: processes of torch may abort when they end."""
    passed = first["failed"] - failed
    return {**first, "passed": first["passed"] + passed, "failed": failed, "second_attempt": passed}


def counts(report: Path) -> dict[str, int]:
    """Returns how many tests have passed, been skipped and failed."""
    (suite,) = xml.etree.ElementTree.parse(report).getroot().iter("testsuite")
    total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    return {"passed": total - skipped - failed, "skipped": skipped, "failed": failed}
