"""Checks that the code reads well: sentences, names and sizes that no other linter checks.

    python tools/lint.py [files or folders]

Rules of documentation hold everywhere except in tests; names and sizes hold in tests as well.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
ROOTS = ("fastreg", "kernels", "benchmarks", "tests", "tools")
DOCUMENTED = ("fastreg", "kernels", "benchmarks", "tools")
AMBIGUOUS = ("place", "own", "found", "held", "every", "given", "former", "told")
"""Words that had several meanings each; a name that says what it holds replaces them."""
FEWEST_WORDS = 5
MOST_LINES = {"fastreg": 400, "kernels": 400, "benchmarks": 450, "tests": 500, "tools": 400}
MOST_PARAMETERS, MOST_KERNEL_PARAMETERS = 12, 16
TORCH_COMPATIBLE = ("Adam", "AdamW", "SGD", "Lion", "DPOptimizer")
"""Classes that have as many parameters as their counterparts in torch or Opacus."""

Complaint = tuple[int, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def main(arguments: list[str]) -> int:
    """Prints all complaints about some files, by default all; returns an exit status."""
    paths = [Path(argument) for argument in arguments or ROOTS]
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    complaints = [(file, *complaint) for file in files for complaint in check(file)]
    for file, line, text in complaints:
        print(f"{file}:{line}: {text}")
    if complaints:
        print(f"{len(complaints)} complaints")
    return bool(complaints)


def check(file: Path) -> list[Complaint]:
    """Returns the complaints about a file: line and text of each."""
    source = file.read_text()
    tree, root = ast.parse(source), _root(file)
    complaints = [*names(tree), *signatures(tree), *length(source, MOST_LINES[root])]
    if root in DOCUMENTED:
        complaints += sentences(tree)
    return sorted(complaints)


def _root(file: Path) -> str:
    file = file.resolve()
    parts = file.relative_to(REPOSITORY).parts if file.is_relative_to(REPOSITORY) else file.parts
    return next((part for part in parts if part in ROOTS), "fastreg")


def length(source: str, most: int) -> Iterator[Complaint]:
    """Complains about files that are too long to be read at one sitting."""
    if (lines := source.count("\n")) > most:
        yield 1, f"{lines} lines: split the file, {most} are the most"


def names(tree: ast.AST) -> Iterator[Complaint]:
    """Complains about variables, parameters, attributes and functions named by an ambiguous word.

    Names imported from other libraries, such as hypothesis's `given`, are allowed.
    """
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    allowed = {alias.name for node in imports for alias in node.names}
    # `every: int` is a period: such parameters have this name everywhere.
    if any(isinstance(n, ast.arg) and n.arg == "every" and _is_int(n.annotation) for n in ast.walk(tree)):
        allowed.add("every")
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) or not isinstance(getattr(node, "ctx", ast.Store()), ast.Store):
            continue  # names are judged where they are defined
        name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
        if isinstance(name, str) and name.strip("_").lower() in AMBIGUOUS and name not in allowed:
            yield getattr(node, "lineno", 1), f"`{name}` may mean many things: say what it holds"


def _is_int(annotation: ast.expr | None) -> bool:
    return isinstance(annotation, ast.Name) and annotation.id == "int"


def signatures(tree: ast.AST) -> Iterator[Complaint]:
    """Complains about functions with too many parameters."""
    for node, path in _walk(tree, ()):
        if isinstance(node, Function) and not _torch_compatible(node, path):
            count = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
            count -= bool(path) and bool(node.args.args) and node.args.args[0].arg in ("self", "cls")
            kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            if count > (most := MOST_KERNEL_PARAMETERS if kernel else MOST_PARAMETERS):
                yield node.lineno, f"`{node.name}` takes {count} parameters, {most} are the most"


def _torch_compatible(node: Function, path: tuple[str, ...]) -> bool:
    return node.name == "__init__" and bool(path) and path[-1] in TORCH_COMPATIBLE


def sentences(tree: ast.Module) -> Iterator[Complaint]:
    """Complains about docstrings whose first sentence is no plain "Does X."."""
    text = ast.get_docstring(tree)
    yield from _sentence(1, text, "module") if text else [(1, "the module has no docstring")]
    for node, path in _walk(tree, ()):
        if not isinstance(node, Function | ast.ClassDef) or not (text := ast.get_docstring(node)):
            continue
        public = not node.name.startswith("_") and not any(name.startswith("_") for name in path)
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        if kind == "function" and any(_noun(decorator) for decorator in node.decorator_list):
            kind = "property"
        yield from _sentence(node.lineno, text, kind) if public else _banned(node.lineno, text)


def _noun(decorator: ast.expr) -> bool:
    return any(word in ast.unparse(decorator) for word in ("property", "setter", "jit"))


def _sentence(line: int, text: str, kind: str) -> Iterator[Complaint]:
    """Complains about the first sentence of a docstring, and about banned words in all of it."""
    first = re.split(r"(?<=\.)\s|\n\n", text.strip())[0]
    words = first.split()
    if len(words) < FEWEST_WORDS:
        yield line, f"{first!r}: say in at least {FEWEST_WORDS} words what it does"
    elif kind == "function" and not re.fullmatch(r"[A-Z][a-z]+s", words[0]):
        yield line, f"{first!r}: begin with what it does, as in 'Returns ...'"
    elif not text.split("\n\n")[0].rstrip().endswith((".", ":")):
        yield line, f"{first!r}: end the sentence with a full stop"
    yield from _banned(line, text)


def _banned(line: int, text: str) -> Iterator[Complaint]:
    for word in re.findall(r"\b[Ll]ikewise\b", text):
        yield line, f"{word!r}: write it out"
    if match := re.search(r"(?m)^(what|who|whoever|nobody)\b.*", text.strip(), re.IGNORECASE):
        yield line, f"{match[0]!r}: name the thing"


def _walk(node: ast.AST, path: tuple[str, ...]) -> Iterator[tuple[ast.AST, tuple[str, ...]]]:
    """Yields all functions and classes under a node, with the names of the classes around each."""
    for child in ast.iter_child_nodes(node):
        yield child, path
        inside = (*path, child.name) if isinstance(child, ast.ClassDef) else path
        if isinstance(child, Function):
            inside = (*path, "_local")
        yield from _walk(child, inside)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
