"""What CONTRIBUTING.md says to do is done here, in a copy of the repository, and works."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
TARGET = re.compile(r"# (?:(append to|create) (\S+)|in ([^\s:]+)(?:::(\w+))?, (below|above): (.+))\n")
PROGRAMS = {"pytest": "-m pytest -q -p no:cacheprovider", "python": "", "fastreg": "-m fastreg.cli"}
CHECKS = (
    ".venv/bin/python tools/lint.py",
    '.venv/bin/pytest -m "not slow" tests/recipe tests/cli/test_usage.py tests/optim/test_registry.py',
)
"""What holds after every addition."""
FOLDERS = ("fastreg", "kernels", "benchmarks", "tests", "tools")
FILES = ("README.md", "CONTRIBUTING.md", "pyproject.toml", "constraints.txt", "Makefile")


def sections() -> dict[str, str]:
    """The sections that say how to add something, by their titles."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)[1:]
    titled = dict(zip(parts[::2], parts[1::2], strict=True))
    return {title: body for title, body in titled.items() if "```python\n   # " in body}


def blocks(section: str, language: str) -> Iterator[str]:
    """The fenced blocks of a language, without the indentation of the list."""
    for indent, kind, content in FENCE.findall(section):
        if kind == language:
            yield "\n".join(line.removeprefix(indent) for line in content.split("\n"))


def edit(folder: Path, block: str) -> None:
    """Does to a file what the first line of a block says."""
    target = TARGET.match(block)
    assert target, f"the block does not begin with the file it belongs to:\n{block}"
    whole, name, part, function, where, line = target.groups()
    content, file = block[target.end() :], folder / (name or part)
    if whole == "create":
        assert not file.exists(), f"{name} exists"
        file.write_text(content, "utf-8")
    elif whole == "append to":
        with file.open("a", encoding="utf-8") as stream:
            stream.write("\n\n" + content)
    else:
        lines = file.read_text("utf-8").split("\n")
        inside = span(lines, function) if function else range(len(lines))
        (index,) = (i for i in inside if lines[i].strip() == line)
        space = "\n\n" if where == "above" and not lines[index].startswith(" ") else ""
        content = content.rstrip("\n") + space
        lines.insert(index + (where == "below"), content)
        file.write_text("\n".join(lines), "utf-8")


def span(lines: list[str], function: str) -> range:
    """The lines of a function of a module."""
    start = next(i for i, text in enumerate(lines) if text.startswith(f"def {function}("))
    following = (i for i in range(start + 1, len(lines)) if lines[i].startswith(("def ", "class ")))
    return range(start, next(following, len(lines)))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the repository with an environment that runs its packages."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "fastreg_benchmarks").symlink_to(tmp_path / "benchmarks")
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, arguments in PROGRAMS.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        (programs / name).chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    return tmp_path


def run(command: str, folder: Path) -> None:
    """Runs a command with the packages of the copy."""
    packages = (folder / "packages", folder, folder / "kernels")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, packages))}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        ("bash", "-o", "pipefail", "-c", command),
        cwd=folder, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"


def apply(title: str, folder: Path) -> None:
    """Does the steps of a section, after those of the section that it continues."""
    section = sections()[title]
    if before := re.search(r"^Continues \[(.+?)\]", section, re.MULTILINE):
        apply(before[1], folder)
    for block in blocks(section, "python"):
        edit(folder, block)


@pytest.mark.parametrize("title", sections())
def test_the_steps_can_be_done(title: str, copy: Path) -> None:
    """The files and lines that they name are there, and each makes Python of its file."""
    apply(title, copy)
    subprocess.run([sys.executable, "-m", "compileall", "-q", *FOLDERS], cwd=copy, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("title", sections())
def test_the_steps_add_what_works(title: str, copy: Path) -> None:
    apply(title, copy)
    commands = [line for block in blocks(sections()[title], "sh") for line in block.splitlines()]
    assert commands, f"{title}: say how to check it"
    for command in (*commands, *CHECKS):
        run(command, copy)


def test_a_step_that_names_no_file_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="does not begin with the file"):
        edit(tmp_path, "def signum():\n    pass\n")
    (tmp_path / "rules.py").write_text("RULES = {}\n")
    with pytest.raises(ValueError, match="not enough values"):
        edit(tmp_path, "# in rules.py, below: RULES = {\n    1: 2,\n")
