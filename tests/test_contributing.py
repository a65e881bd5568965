"""What CONTRIBUTING.md says to do is done here, in a copy of the repository, and works."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
TARGET = re.compile(r"# (?:(append to|create) (\S+)|in ([^\s:]+)(?:::(\w+))?, (below|above): (.+))\n")
PROGRAMS = {
    "make render": (sys.executable, "-m", "fastreg_benchmarks.render"),
    ".venv/bin/pytest": (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
    ".venv/bin/python": (sys.executable,),
    ".venv/bin/fastreg": (sys.executable, "-m", "fastreg.cli"),
}
COPIED = ("fastreg", "kernels", "benchmarks", "tests", "tools", "README.md", "pyproject.toml")


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
        content = content.rstrip("\n") if where == "below" else content + "\n"
        lines.insert(index + (where == "below"), content)
        file.write_text("\n".join(lines), "utf-8")


def span(lines: list[str], function: str) -> range:
    """The lines of a function of a module."""
    start = next(i for i, text in enumerate(lines) if text.startswith(f"def {function}("))
    following = (i for i in range(start + 1, len(lines)) if lines[i].startswith(("def ", "class ")))
    return range(start, next(following, len(lines)))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "fastreg_benchmarks").symlink_to(tmp_path / "benchmarks")
    return tmp_path


def run(command: str, folder: Path) -> None:
    """Runs a command with the packages of the copy."""
    program = next(name for name in PROGRAMS if command.startswith(name))
    packages = (folder / "packages", folder, folder / "kernels")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, packages))}
    environment.pop("TRITON_INTERPRET", None)
    words = (*PROGRAMS[program], *shlex.split(command.removeprefix(program)))
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"


@pytest.mark.parametrize("title", sections())
def test_the_steps_can_be_done(title: str, copy: Path) -> None:
    """The files and lines that they name are there, and each makes Python of its file."""
    for block in blocks(sections()[title], "python"):
        edit(copy, block)
    subprocess.run([sys.executable, "-m", "compileall", "-q", *COPIED[:4]], cwd=copy, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("title", sections())
def test_the_steps_add_what_works(title: str, copy: Path) -> None:
    section = sections()[title]
    for block in blocks(section, "python"):
        edit(copy, block)
    commands = [line for block in blocks(section, "sh") for line in block.splitlines()]
    assert commands, f"{title}: say how to check it"
    for command in commands:
        run(command, copy)


def test_a_step_that_names_no_file_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="does not begin with the file"):
        edit(tmp_path, "def signum():\n    pass\n")
    (tmp_path / "rules.py").write_text("RULES = {}\n")
    with pytest.raises(ValueError, match="not enough values"):
        edit(tmp_path, "# in rules.py, below: RULES = {\n    1: 2,\n")
