"""What Inductor has made of a function for CPUs: as a small program of its own that can be kept on disk.

    torch.compile ──▶ a Python function `call(args)` that allocates and launches, and a library of C++ kernels
    capture       ──▶ the same two, and which of its arguments is which tensor or size of the caller's
    save, load    ──▶ both from a folder, in a later process, without Dynamo or Inductor

Compiling takes seconds in every process, and loading what torch itself can save takes one, most of it for
importing Inductor; a program loads in milliseconds.  What does not look as expected is not captured: the
caller keeps what torch has compiled.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import platform
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .fingerprint import Unknown, fingerprint

FORMAT = 2
_ALLOCATING = ("empty_strided_cpu", "reinterpret_tensor", "assert_size_stride")
"""What `call` may name besides torch and its kernels, and where torch keeps it."""


class Program:
    """A compiled function of tensors.

    Args:
        source: Of `call`, a function of a list that it empties.
        libraries: The file of each kernel that `call` names.
        order: For each argument of `call`, which tensor of the caller's it is, and which of its dimensions
            where it is a size.
        written: Which tensors of the caller's are changed in place.
        results: Which of the results of `call` to give back: the place of one, a list of such, or `None`.
    """

    def __init__(
        self, source: str, libraries: dict[str, str], order: list[tuple[int, int | None]], written: list[int],
        results: Any,
    ) -> None:  # fmt: skip
        self.source, self.libraries = source, libraries
        self.order, self.written, self.results = order, written, results
        names: dict[str, Any] = {"torch": torch, **{name: _allocator(name) for name in _ALLOCATING}}
        names |= {name: _kernel(file) for name, file in libraries.items()}
        exec(compile(source, "<fastreg program>", "exec"), names)  # written by Inductor, see `capture`
        self._call: Callable[[list[Any]], Sequence[Tensor]] = names["call"]

    def __call__(self, *arguments: Any) -> Any:
        """Run it on tensors, and lists of tensors, of the dtypes and dimensions that it was compiled for."""
        given = _flat(arguments)
        found = self._call([given[i] if dim is None else given[i].shape[dim] for i, dim in self.order])
        if self.written:
            torch.autograd.graph.increment_version([given[i] for i in self.written])
        return _arranged(self.results, found)


def _arranged(results: Any, found: Sequence[Tensor]) -> Any:
    if isinstance(results, int):
        return found[results]
    return None if results is None else tuple(_arranged(each, found) for each in results)


def _flat(arguments: Sequence[Any]) -> list[Tensor]:
    flat: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            flat.append(argument)
        else:
            flat += argument
    return flat


def _allocator(name: str) -> Any:
    guards = torch._C._dynamo.guards
    return getattr(guards, name if hasattr(guards, name) else f"_{name}")


def _kernel(file: str) -> Any:
    """The function that a library of Inductor's exports to Python."""
    # Where its code finds out how to get at the memory of a tensor; Inductor hands it over in the same way.
    address = torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr  # type: ignore[attr-defined]
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(address)
    spec = importlib.util.spec_from_file_location(f"{Path(file).stem}.kernel", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.kernel


# From what torch has compiled ------------------------------------------------------------------------------


class Unexpected(Exception):
    """What torch has compiled does not look as a program must; the message says what is different."""


def modules() -> list[Any]:
    """The Python modules that Inductor has written and loaded so far."""
    return list(importlib.import_module("torch._inductor.codecache").PyCodeCache.modules)


def capture(compiled: Callable[..., Any], examples: Sequence[Any], written_by: Sequence[Any]) -> Program:
    """The program behind a compiled function.

    Args:
        compiled: The function; it is run once.
        examples: Arguments for it, which it may change.
        written_by: The modules that Inductor wrote while it was compiled.

    Raises:
        Unexpected: If there is no such program.
    """
    if len(written_by) != 1:
        raise Unexpected(f"{len(written_by)} modules instead of one")
    (module,) = written_by
    given = _flat(examples)
    versions = [tensor._version for tensor in given]
    arguments, returned, result = _run(compiled, examples, module.call.__code__)
    source, kernels = _source(module)
    libraries = {name: _file(getattr(module, name)) for name in kernels}
    order = [_origin(argument, given) for argument in arguments]
    written = [i for i, tensor in enumerate(given) if tensor._version != versions[i]]
    return Program(source, libraries, order, written, _results(result, returned))


def _run(compiled: Callable[..., Any], examples: Sequence[Any], code: Any) -> tuple[Any, Any, Any]:
    """What Inductor's function is called with, what it returns, and what the compiled function does."""
    seen: dict[str, Any] = {}

    def watch(frame: Any, event: str, value: Any) -> None:
        if frame.f_code is code and event == "call":
            seen["arguments"] = list(frame.f_locals["args"])
        elif frame.f_code is code and event == "return":
            seen["returned"] = value

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        with torch.no_grad():
            result = compiled(*examples)
    finally:
        sys.setprofile(before)
    if seen.keys() != {"arguments", "returned"}:
        raise Unexpected("its function was not called")
    return seen["arguments"], seen["returned"], result


def _source(module: Any) -> tuple[str, list[str]]:
    """The source of `call`, and the kernels that it names."""
    tree = ast.parse(inspect.getsource(module))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "call"]
    if len(found) != 1:
        raise Unexpected(f"{len(found)} functions named call")
    (function,) = found
    function.args.args = [argument for argument in function.args.args if argument.arg != "self"]
    bound = {
        node.id
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    bound |= {argument.arg for argument in function.args.args}
    named = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)} - bound
    kernels = [
        name for name in named if inspect.isbuiltin(getattr(module, name, None)) and name not in _ALLOCATING
    ]
    if others := named - {"torch", *_ALLOCATING, *kernels}:
        raise Unexpected(f"it names {', '.join(sorted(others))}")
    return ast.unparse(function), sorted(kernels)


def _file(kernel: Any) -> str:
    file = getattr(kernel.__self__, "__file__", None)
    if file is None:
        raise Unexpected(f"{kernel} has no library")
    return str(file)


def _origin(argument: Any, given: Sequence[Tensor]) -> tuple[int, int | None]:
    """Which of the given tensors an argument is, or a size of which."""
    for i, tensor in enumerate(given):
        if argument is tensor:
            return i, None
    if isinstance(argument, int):
        for i, tensor in enumerate(given):
            if argument in tensor.shape:
                return i, list(tensor.shape).index(argument)
    raise Unexpected(f"an argument is neither a tensor nor a size of one: {argument!r}")


def _results(result: Any, returned: Sequence[Any]) -> Any:
    """Where the results of the compiled function are among those of `call`."""
    if result is None:
        return None
    if isinstance(result, (tuple, list)):
        return [_results(each, returned) for each in result]
    place = next((i for i, each in enumerate(returned) if each is result), None)
    if place is None:
        raise Unexpected("a result is made behind it")
    return place


# On disk ----------------------------------------------------------------------------------------------------


def folder() -> Path | None:
    """Where programs are kept: `FASTREG_CACHE_DIR`, "off" for nowhere; by default in the user's cache."""
    given = os.environ.get("FASTREG_CACHE_DIR", "")
    if given.lower() == "off":
        return None
    if given:
        return Path(os.path.expanduser(given)) / "programs"
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    try:
        return (Path(base) if base else Path.home() / ".cache") / "fastreg" / "programs"
    except RuntimeError:  # there is no home
        return None


def key(function: Callable[..., Any], examples: Sequence[Any]) -> str | None:
    """What a program is known by: all code that runs, the kind of its arguments, this machine, all versions.

    `None` for a function that cannot be known again, because it holds something else than code and numbers.
    """
    kinds = [(str(t.dtype), str(t.device), list(t.shape), list(t.stride())) for t in _flat(examples)]
    if any(tensor.device.type != "cpu" for tensor in _flat(examples)):
        return None
    try:
        code = fingerprint(function)
    except Unknown:
        return None
    known = [FORMAT, code, kinds, torch.get_num_threads(), _machine(), _settings()]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _machine() -> list[Any]:
    """The processor, down to its features (Inductor compiles for the one that it finds), and versions."""
    features = platform.processor()
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith(("model name", "flags", "Features"))]
        features = " ".join(dict.fromkeys(lines))
    except OSError:
        pass
    versions = sys.version, torch.__version__, torch.version.git_version, torch.__file__
    return [platform.machine(), features, torch.backends.cpu.get_cpu_capability(), *versions]


def _settings() -> list[Any]:
    """What is set for all of torch, and what of Inductor's settings is not its default."""
    state = [str(torch.get_default_dtype()), str(torch.get_default_device())]
    state.append(str(torch.are_deterministic_algorithms_enabled()))
    chosen = {
        name: value
        for name, value in os.environ.items()
        if name == "CXX" or (name.startswith(("TORCHINDUCTOR_", "TORCH_COMPILE_")) and "CACHE" not in name)
    }
    config: Any = sys.modules.get("torch._inductor.config")  # importing it would take a second
    lines = config.codegen_config().splitlines() if config else []
    return [state, sorted(chosen.items()), sorted(line for line in lines if not _at_default(config, line))]


def _at_default(config: Any, line: str) -> bool:
    """Whether a line of `codegen_config` tells of a default, after a setting was patched and restored."""
    name = line.partition(" = ")[0].removeprefix(f"{config.__name__}.")
    entry = config._config.get(name)
    return entry is not None and getattr(config, name) == entry.default


def load(key: str) -> Program | None:
    """The program that is kept under a key; `None` if there is none that is whole and to be trusted."""
    place = folder()
    if place is None:
        return None
    try:
        kept = _intact(place / key)
        libraries = {name: str(place / key / file) for name, (file, _) in kept["libraries"].items()}
        order = [(i, dim) for i, dim in kept["order"]]
        return Program(kept["source"], libraries, order, kept["written"], kept["results"])
    except Exception:  # whatever is wrong with it, it is compiled anew, and replaced
        return None


def _intact(made: Path) -> dict[str, Any]:
    """What the file of a program tells, once its libraries are known to be as they were written.

    Raises:
        OSError: If a file is missing or cannot be read.
        ValueError: If a file is damaged, or somebody else may have written it.
    """
    _check_owner(made)
    _check_owner(made / "program.json")
    kept: dict[str, Any] = json.loads((made / "program.json").read_text())
    for file, digest in kept["libraries"].values():
        _check_owner(made / file)
        if _digest(made / file) != digest:
            raise ValueError(f"{made / file} is damaged")
    return kept


def _check_owner(path: Path) -> None:
    """Raise `ValueError` where somebody else than this user and the system could have written what is run."""
    if os.name == "nt":
        return
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode) or status.st_uid not in (0, os.getuid()) or status.st_mode & 0o022:
        raise ValueError(f"others than this user may write {path}")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def save(key: str, program: Program) -> None:
    """Keep a program under a key, instead of a damaged one; nothing where the folder cannot be written.

    Whole or not at all: it is written beside its place and moved there, so that no process sees half of it.
    """
    place, made = folder(), None
    if place is None:
        return
    try:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            _intact(place / key)
            return  # another process was faster
        place.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=place, prefix="."))
        libraries = {}
        for i, (name, file) in enumerate(program.libraries.items()):
            shutil.copyfile(file, made / f"{i}.so")
            libraries[name] = (f"{i}.so", _digest(made / f"{i}.so"))
        kept = {
            "source": program.source, "libraries": libraries, "order": program.order,
            "written": program.written, "results": program.results,
        }  # fmt: skip
        (made / "program.json").write_text(json.dumps(kept))
        for path in made.iterdir():
            path.chmod(0o644)
        made.chmod(0o755)  # an image may be filled by root and used by others
        with contextlib.suppress(FileNotFoundError):
            (place / key).rename(made / "damaged")
        made.rename(place / key)
        shutil.rmtree(place / key / "damaged", ignore_errors=True)
    except OSError:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def writable() -> bool:
    """Whether programs can be kept in the folder, or the folder be made."""
    place = folder()
    if place is None:
        return False
    try:
        there = next(path for path in (place, *place.parents) if path.exists())
    except OSError:
        return False
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def kept() -> tuple[int, int]:
    """How many programs are kept, and their bytes."""
    place = folder()
    try:
        files = [file for file in place.glob("*/*") if file.is_file()] if place else []
        return sum(file.name == "program.json" for file in files), sum(file.stat().st_size for file in files)
    except OSError:
        return 0, 0
