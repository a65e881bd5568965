"""Stores functions that Inductor compiled for CPUs on disk, so that later processes load them at once.

    torch.compile   makes a Python function `call(args)` that allocates and launches, and C++ kernels
    capture         takes both, and notes which argument of `call` is which tensor or size of the caller's
    save, load      write both to a folder, and read them in a later process, without Dynamo or Inductor

Compiling takes seconds in every process.  Loading the artifacts that torch itself can save takes one second,
mostly for importing Inductor; a program loads in milliseconds.  If the compiled code has an unexpected form,
`capture` raises `Unexpected`, and the caller keeps torch's function.
"""

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
"""Functions of torch that `call` may use besides its kernels."""


class Program:
    """A compiled function of tensors, which can be saved.

    `source` defines `call`, a function of a list of arguments, which it empties; `libraries` are the files of
    the kernels that it names. `order` has for each argument the index of the caller's tensor, and a dimension
    of it if the argument is its size, else `None`. `written` are the indices of tensors that are changed in
    place. `results` is the index of the result among those of `call`, a list of such, or `None`.
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
        """Runs on tensors and lists of tensors with the dtypes and dimensions of the examples."""
        tensors = _flat(arguments)
        outputs = self._call([tensors[i] if dim is None else tensors[i].shape[dim] for i, dim in self.order])
        if self.written:
            torch.autograd.graph.increment_version([tensors[i] for i in self.written])
        return _select(outputs, self.results)


def _select(outputs: Sequence[Tensor], indices: Any) -> Any:
    if isinstance(indices, int):
        return outputs[indices]
    return None if indices is None else tuple(_select(outputs, index) for index in indices)


def _flat(arguments: Sequence[Any]) -> list[Tensor]:
    return [
        tensor
        for argument in arguments
        for tensor in ([argument] if isinstance(argument, Tensor) else argument)
    ]


def _allocator(name: str) -> Any:
    guards = torch._C._dynamo.guards
    return getattr(guards, name if hasattr(guards, name) else f"_{name}")


def _kernel(file: str) -> Any:
    """Returns the function that a library of Inductor's exports to Python."""
    # The library reads from this variable how to get at the memory of a tensor, as with Inductor itself.
    address = torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr  # type: ignore[attr-defined]
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(address)
    spec = importlib.util.spec_from_file_location(f"{Path(file).stem}.kernel", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.kernel


# Capturing -----------------------------------------------------------------------------------------------


class Unexpected(Exception):
    """Compiled code has an unexpected form; the message says what is different."""


def modules() -> list[Any]:
    """Returns the Python modules that Inductor has written and loaded so far."""
    return list(importlib.import_module("torch._inductor.codecache").PyCodeCache.modules)


def capture(compiled: Callable[..., Any], examples: Sequence[Any], written_by: Sequence[Any]) -> Program:
    """Returns the program behind a compiled function, which is run once on examples and may change them.

    `written_by` are the modules that Inductor wrote while it compiled the function. Raises `Unexpected` if
    the function does not have the form of a program.
    """
    if len(written_by) != 1:
        raise Unexpected(f"{len(written_by)} modules instead of one")
    (module,) = written_by
    tensors = _flat(examples)
    versions = [tensor._version for tensor in tensors]
    arguments, returned, result = _run(compiled, examples, module.call.__code__)
    source, kernels = _source(module)
    libraries = {name: _file(getattr(module, name)) for name in kernels}
    order = [_origin(argument, tensors) for argument in arguments]
    written = [i for i, tensor in enumerate(tensors) if tensor._version != versions[i]]
    return Program(source, libraries, order, written, _results(result, returned))


def _run(compiled: Callable[..., Any], examples: Sequence[Any], code: Any) -> tuple[Any, Any, Any]:
    """Returns the arguments and outputs of Inductor's `call`, and the result of the compiled function."""
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
    """Returns the source of `call`, and the names of the kernels in it."""
    tree = ast.parse(inspect.getsource(module))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "call"]
    if len(calls) != 1:
        raise Unexpected(f"{len(calls)} functions named call")
    (function,) = calls
    function.args.args = [argument for argument in function.args.args if argument.arg != "self"]
    names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    bound = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    named = {name.id for name in names} - bound - {argument.arg for argument in function.args.args}
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


def _origin(argument: Any, tensors: Sequence[Tensor]) -> tuple[int, int | None]:
    """Returns the index of the tensor that an argument is, or of one and the dimension whose size it is."""
    for i, tensor in enumerate(tensors):
        if argument is tensor:
            return i, None
        if isinstance(argument, int) and argument in tensor.shape:
            return i, list(tensor.shape).index(argument)
    raise Unexpected(f"an argument is neither a tensor nor a size of one: {argument!r}")


def _results(result: Any, outputs: Sequence[Any]) -> Any:
    """Returns the indices of the results of the compiled function among the outputs of `call`."""
    if result is None:
        return None
    if isinstance(result, (tuple, list)):
        return [_results(item, outputs) for item in result]
    for i, output in enumerate(outputs):
        if output is result:
            return i
    raise Unexpected("a result is made after it")


# On disk ----------------------------------------------------------------------------------------------------


def folder() -> Path | None:
    """Returns the folder of programs; `None` if `FASTREG_CACHE_DIR` is "off".

    `FASTREG_CACHE_DIR` names its parent; by default it is in the user's cache.
    """
    setting = os.environ.get("FASTREG_CACHE_DIR", "")
    if setting.lower() == "off":
        return None
    if setting:
        return Path(os.path.expanduser(setting)) / "programs"
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    try:
        return (Path(base) if base else Path.home() / ".cache") / "fastreg" / "programs"
    except RuntimeError:  # there is no home
        return None


def key(function: Callable[..., Any], examples: Sequence[Any]) -> str | None:
    """Returns the name that a program is saved under, which changes with all that the program depends on.

    These are: all code that runs, dtypes, shapes and strides of the arguments, machine, versions, settings.
    `None` for a function that holds something else than code and numbers, and for tensors on a GPU.
    """
    tensors = _flat(examples)
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    layouts = [(str(t.dtype), str(t.device), list(t.shape), list(t.stride())) for t in tensors]
    try:
        code = fingerprint(function)
    except Unknown:
        return None
    parts = [FORMAT, code, layouts, torch.get_num_threads(), _machine(), _settings()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _machine() -> list[Any]:
    """Returns the processor with its features, for which Inductor compiles, and versions."""
    features = platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        lines = [line for line in file if line.startswith(("model name", "flags", "Features"))]
        features = " ".join(dict.fromkeys(lines))
    versions = sys.version, torch.__version__, torch.version.git_version, torch.__file__
    return [platform.machine(), features, torch.backends.cpu.get_cpu_capability(), *versions]


def _settings() -> list[Any]:
    """Returns global settings of torch, and those of Inductor that differ from their defaults."""
    state = [str(torch.get_default_dtype()), str(torch.get_default_device())]
    state.append(str(torch.are_deterministic_algorithms_enabled()))
    chosen = {
        name: value
        for name, value in os.environ.items()
        if name == "CXX" or (name.startswith(("TORCHINDUCTOR_", "TORCH_COMPILE_")) and "CACHE" not in name)
    }
    config: Any = sys.modules.get("torch._inductor.config")  # importing it would take a second
    lines = config.codegen_config().splitlines() if config else []
    return [state, sorted(chosen.items()), sorted(line for line in lines if not _is_default(config, line))]


def _is_default(config: Any, line: str) -> bool:
    """Returns whether a line of `codegen_config` names a default, as after a patch was undone."""
    name = line.partition(" = ")[0].removeprefix(f"{config.__name__}.")
    entry = config._config.get(name)
    return entry is not None and getattr(config, name) == entry.default


def load(key: str) -> Program | None:
    """Returns the program saved under a key; `None` if there is none, or it is damaged or not trusted."""
    parent = folder()
    if parent is None:
        return None
    try:
        saved = _read(parent / key)
        libraries = {name: str(parent / key / file) for name, (file, _) in saved["libraries"].items()}
        order = [(i, dim) for i, dim in saved["order"]]
        return Program(saved["source"], libraries, order, saved["written"], saved["results"])
    except Exception:  # whatever is wrong with it, it is compiled again and replaced
        return None


def _read(path: Path) -> dict[str, Any]:
    """Returns the contents of a program's file; raises an error if it, or a library, cannot be trusted."""
    _check_owner(path)
    _check_owner(path / "program.json")
    saved: dict[str, Any] = json.loads((path / "program.json").read_text())
    for file, digest in saved["libraries"].values():
        _check_owner(path / file)
        if _digest(path / file) != digest:
            raise ValueError(f"{path / file} is damaged")
    return saved


def _check_owner(path: Path) -> None:
    """Raises `ValueError` if another user than this one and root may have written a file that is run."""
    if os.name == "nt":
        return
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode) or status.st_uid not in (0, os.getuid()) or status.st_mode & 0o022:
        raise ValueError(f"others than this user may write {path}")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def save(key: str, program: Program) -> None:
    """Saves a program under a key, or nothing if the folder cannot be written.

    The files are written to a folder beside, which is then renamed: no process sees half a program.
    """
    parent, new = folder(), None
    if parent is None:
        return
    try:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            _read(parent / key)
            return  # another process was faster
        parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=parent, prefix="."))
        libraries = {}
        for i, (name, file) in enumerate(program.libraries.items()):
            shutil.copyfile(file, new / f"{i}.so")
            libraries[name] = (f"{i}.so", _digest(new / f"{i}.so"))
        saved = {name: getattr(program, name) for name in ("source", "order", "written", "results")}
        (new / "program.json").write_text(json.dumps({**saved, "libraries": libraries}))
        for path in new.iterdir():
            path.chmod(0o644)
        new.chmod(0o755)  # an image may be filled by root and used by others
        with contextlib.suppress(FileNotFoundError):
            (parent / key).rename(new / "damaged")
        new.rename(parent / key)
        shutil.rmtree(parent / key / "damaged", ignore_errors=True)
    except OSError:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)


def writable() -> bool:
    """Returns whether programs can be saved: the folder is writable, or can be made."""
    with contextlib.suppress(OSError):
        if (path := folder()) is not None:
            existing = next(parent for parent in (path, *path.parents) if parent.exists())
            return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return False


def disk_usage() -> tuple[int, int]:
    """Returns the number of saved programs, and their bytes."""
    with contextlib.suppress(OSError):
        files = [file for file in path.glob("*/*") if file.is_file()] if (path := folder()) else []
        return sum(file.name == "program.json" for file in files), sum(file.stat().st_size for file in files)
    return 0, 0
