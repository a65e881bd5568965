"""What importing fastreg brings along, what it leaves alone, and which way imports may point."""

import ast
import functools
import graphlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the top floor down. A module imports from its own floor and those below; all may import `reference`.
FLOORS = (
    "cli",
    "fastreg",  # the public names
    "hf",
    "loops",
    "training",
    "recipe",
    "privacy",
    "losses",
    "adversarial",
    "optim",
    "layerwise",
    "nn",
    "ops",
    "engine",
    "runtime",
    "schedules",
    "common",
)
WITHIN = {
    "losses": ("r_drop", "penalties"),
    "engine": (
        "multi_tensor_optimizer", "grad_norm", "state rounding", "launch", "launch.eager",
        "launch.compiled launch.triton", "component plan", "batch table",
        "stage layout device_scalars grad_scaler",
    ),
    "runtime": (
        "environment", "compile_ahead", "programs", "fingerprint", "kernel_cache", "device",
        "launch_parameters", "backend",
    ),
    "common": ("random", "blocks unwrap", "batch_norm", "batches module_state", "validation versions"),
}  # fmt: skip
"""Floors of the modules within a package, from the top down; modules in one string share a floor."""


def modules() -> dict[str, str]:
    """The source of every module that users import, by dotted name; packages end in `.__init__`."""
    roots = {"fastreg": ROOT / "fastreg", "fastreg_kernels": ROOT / "kernels" / "fastreg_kernels"}
    return {
        ".".join((name, *file.relative_to(root).with_suffix("").parts)): file.read_text()
        for name, root in roots.items()
        for file in sorted(root.rglob("*.py"))
    }


def imports(module: str, source: str) -> Iterator[tuple[str, bool]]:
    """The absolute name of all that `module` imports, and whether that waits until a function is called."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = module.split(".")[: -child.level] if child.level else []
                base += child.module.split(".") if child.module else []
                yield from ((".".join((*base, alias.name)), lazy) for alias in child.names)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, lazy or function or typing_only)

    return walk(ast.parse(source), lazy=False)


def floor(name: str) -> tuple[int, int]:
    """The floor of a module's package, and that within the package, which itself is above its modules."""
    package, *path = name.split(".")[1:]
    package = package if package in FLOORS else "fastreg"
    within = [modules.split() for modules in WITHIN.get(package, ())]
    prefixes = [".".join(path[:length]) for length in range(len(path), 0, -1)]
    heights = (i for prefix in prefixes for i, modules in enumerate(within, 1) if prefix in modules)
    return FLOORS.index(package), next(heights, 0)


def complaint(module: str, target: str, lazy: bool) -> str | None:
    """Why `module` may not import `target`, if it may not."""
    package = target.partition(".")[0]
    if package in sys.stdlib_module_names:
        return None
    if module.startswith("fastreg_kernels."):
        return None if package in ("triton", "fastreg_kernels") else "kernels import only triton"
    if module.startswith("fastreg.reference."):
        return (
            None if target.startswith(("torch", "fastreg.reference.")) else "the reference imports only torch"
        )
    if package in ("triton", "fastreg_kernels"):
        return None if lazy else "triton is imported by the function that needs it"
    if package == "fastreg_benchmarks":
        return None if floor(module)[0] == 0 else "only the command line runs benchmarks"
    if package == "fastreg" and not target.startswith("fastreg.reference"):
        return None if floor(module) <= floor(f"{target}.") else "imports point downward"
    return None


def complaints(sources: dict[str, str]) -> list[str]:
    return [
        f"{module} imports {target}: {why}"
        for module, source in sources.items()
        for target, lazy in imports(module, source)
        if (why := complaint(module, target, lazy))
    ]


def in_order(sources: dict[str, str]) -> list[str]:
    """The modules, each after those that it imports; raises `CycleError` where there is no such order."""

    def file_of(target: str) -> str | None:
        while target:
            for name in (target, f"{target}.__init__"):
                if name in sources:
                    return name
            target = target.rpartition(".")[0]
        return None

    graph = {
        module: {file_of(target) for target, lazy in imports(module, source) if not lazy} - {None}
        for module, source in sources.items()
    }
    return list(graphlib.TopologicalSorter(graph).static_order())


def test_every_module_has_a_floor() -> None:
    rooms = {name.split(".")[1] for name in modules() if name.startswith("fastreg.")}
    assert rooms - {*FLOORS, "reference", "__init__"} == set(), "name the new module in FLOORS, at its height"
    for package, floors in WITHIN.items():
        prefix = f"fastreg.{package}."
        names = {
            name.removeprefix(prefix).removesuffix(".__init__")
            for name in modules()
            if name.startswith(prefix)
        }
        assert names - {"__init__"} == {*" ".join(floors).split()}, "name the new module in WITHIN"


def test_the_floor_plan_is_that_of_the_contributors() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("| floor | contents |")[1].split("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == FLOORS


def test_imports_point_downward() -> None:
    assert complaints(modules()) == []


def test_no_import_cycles() -> None:
    assert {"fastreg.__init__", "fastreg_kernels.__init__"} <= set(in_order(modules()))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastreg_kernels.step", "import torch"),
        ("fastreg_kernels.step", "from fastreg.common.random import key"),
        ("fastreg.reference.step", "from ..common.random import key"),
        ("fastreg.reference.step", "import triton"),
        ("fastreg.optim.adamw", "import triton.language as tl"),
        ("fastreg.optim.adamw", "class A:\n    from fastreg_kernels import rules"),
        ("fastreg.runtime.backend", "try:\n    import triton\nexcept ImportError:\n    triton = None"),
        ("fastreg.runtime.backend", "def f():\n    from ..engine.launch import run"),
        ("fastreg.runtime.fingerprint", "def f():\n    from .programs import load"),
        ("fastreg.runtime.backend", "from . import device"),
        ("fastreg.engine.stage", "from .table import Table"),
        ("fastreg.engine.batch", "from . import grad_norm"),
        ("fastreg.engine.launch.compiled", "from . import eager"),
        ("fastreg.common.validation", "def f():\n    from .random import key"),
        ("fastreg.losses.penalties", "from .r_drop import RDrop"),
        ("fastreg.common.random", "from .. import optim"),
        ("fastreg.common.random", "import fastreg"),
        ("fastreg.optim.__init__", "from .. import AdamW"),
        ("fastreg.__init__", "from .cli import main"),
        ("fastreg.optim.fused_optimizer", "import fastreg_benchmarks.suite"),
    ],
)
def test_a_wrong_import_is_noticed(module: str, source: str) -> None:
    assert len(complaints({module: source})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastreg_kernels.step", "import triton\nfrom typing import Any\nfrom .random import normal"),
        ("fastreg.reference.step", "from torch import Tensor\nfrom . import random\nimport math"),
        ("fastreg.optim.fused_optimizer", "from ..runtime import backend\nfrom ..reference import rules"),
        ("fastreg.engine.grad_norm", "from .launch import measure\nfrom .batch import Batch"),
        ("fastreg.engine.launch.__init__", "from . import eager, triton"),
        ("fastreg.runtime.environment", "from . import backend, programs"),
        ("fastreg.engine.launch.triton", "def f():\n    import triton\n    from fastreg_kernels import step"),
        ("fastreg.cli.bench", "import fastreg\nfrom fastreg_benchmarks import step\nfrom . import draw"),
    ],
)
def test_a_right_import_is_accepted(module: str, source: str) -> None:
    assert complaints({module: source}) == []


def test_an_import_cycle_is_noticed() -> None:
    with pytest.raises(graphlib.CycleError):
        in_order(
            {"fastreg.a": "from .b import x", "fastreg.b": "from . import c", "fastreg.c": "import fastreg.a"}
        )
    in_order({"fastreg.a": "from .b import x", "fastreg.b": "def f():\n    from . import a"})


def python(code: str, cwd: Path, first_on_path: str = "") -> object:
    """Run `code` in a Python of its own, as a user would, and return the JSON that it prints last."""
    environment = {name: value for name, value in os.environ.items() if name != "FASTREG_BACKEND"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (first_on_path, environment.get("PYTHONPATH"))))
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_importing_fastreg_imports_nothing_heavy(tmp_path: Path) -> None:
    imported = python(
        """
import json, sys, torch

def refuse():
    raise AssertionError("importing fastreg initialised CUDA")

torch.cuda._lazy_init = refuse
before = set(sys.modules)
import fastreg
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
""",
        cwd=tmp_path,
    )
    assert isinstance(imported, list) and "fastreg" in imported
    heavy = {"accelerate", "fastreg_kernels", "matplotlib", "rich", "transformers", "triton"}
    assert heavy.isdisjoint(imported)


def test_the_trainer_is_imported_when_it_is_used() -> None:
    pytest.importorskip("transformers")
    code = "import fastreg, json; print(json.dumps([fastreg.hf.__name__, hasattr(fastreg, 'fh')]))"
    assert python(code, cwd=ROOT) == ["fastreg.hf", False]


def test_fastreg_steps_where_triton_is_missing(tmp_path: Path) -> None:
    """As on macOS and Windows: no finder knows triton, which also `importlib.util.find_spec` then tells."""
    difference = python(
        """
import importlib.util, json, sys

class WithoutTriton:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(WithoutTriton, sys.meta_path)
assert importlib.util.find_spec("triton") is None

import torch
import fastreg

def train(optimizer_class):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer = optimizer_class(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])

print(json.dumps((train(fastreg.AdamW) - train(torch.optim.AdamW)).abs().max().item()))
""",
        cwd=tmp_path,
    )
    # Weights of size one after three steps: a few roundings of float32.
    assert difference < 1e-6


def accepted_version() -> str:
    """A version of Hugging Face's `kernels` that the installed transformers accepts."""
    wanted = next(
        line for line in importlib.metadata.requires("transformers") or () if line.startswith("kernels")
    )
    lowest = re.search(r">=\s*([\d.]+)", wanted)
    assert lowest, wanted
    return lowest[1]


def pretend_to_install_kernels(folder: Path) -> None:
    """A distribution `kernels` that has every name transformers may ask it for."""
    package = folder / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "def __getattr__(name):\n"
        "    if name.startswith('__'):\n"
        "        raise AttributeError(name)\n"
        "    return type(name, (), {})\n"
    )
    version = accepted_version()
    metadata = folder / f"kernels-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")


def what_transformers_sees(imported: str, cwd: Path, first_on_path: str) -> object:
    """Whether transformers finds Hugging Face's `kernels`, and in which file."""
    return python(
        f"""
import json, sys
import {imported}
from transformers.utils import is_kernels_available
import transformers.integrations.hub_kernels
available = is_kernels_available()
print(json.dumps([available, sys.modules["kernels"].__file__ if available else None]))
""",
        cwd,
        first_on_path,
    )


@functools.cache
def without_fastreg() -> object:
    return what_transformers_sees("transformers", cwd=Path(sys.prefix), first_on_path="")


@pytest.mark.parametrize("installed", [False, True], ids=["without kernels", "with kernels"])
@pytest.mark.parametrize("folder", ["checkout", pytest.param("elsewhere", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "order", ["fastreg, transformers", pytest.param("transformers, fastreg", marks=pytest.mark.slow)]
)
def test_transformers_finds_the_kernels_it_would_find_without_fastreg(
    order: str, folder: str, installed: bool, tmp_path: Path
) -> None:
    """In the checkout `kernels/` is a namespace package, which any installed `kernels` must win against."""
    cwd = ROOT if folder == "checkout" else tmp_path
    site = tmp_path / "site"
    if installed:
        pretend_to_install_kernels(site)
        expected: object = [True, str(site / "kernels" / "__init__.py")]
    else:
        expected = without_fastreg()
    assert what_transformers_sees(order, cwd, first_on_path=str(site)) == expected
