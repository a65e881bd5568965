"""Computes digests of all code that a function runs, to recognise functions that were compiled before.

Digests depend on the code and values in this process, not on files: a function that is replaced has another
digest, and a file that is edited under a running process changes none.
"""

import abc
import collections
import dataclasses
import dis
import functools
import hashlib
import importlib
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import torch

FOREIGN = (
    "torch", "builtins", "math", "functools", "operator", "collections", "typing", "itertools", "abc",
    "dataclasses", "reprlib", "types",
)  # fmt: skip
"""Modules whose code counts by name only; their versions belong to the key of a program."""

_BY_REPR = (
    type(None), bool, int, float, complex, str, bytes, range, type(...), type(NotImplemented),
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
"""Types whose values are described by their `repr`."""

_C_METHODS = types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType
_BY_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    slice: ("start", "stop", "step"),
    functools.partial: ("func", "args", "keywords", "__dict__"),
    functools.partialmethod: ("func", "args", "keywords", "__dict__"),
    functools.cached_property: ("func", "attrname"),
    property: ("fget", "fset", "fdel"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    dataclasses.Field: ("name", "default", "default_factory", "metadata"),
    types.MethodType: ("__func__", "__self__"),
    types.MethodWrapperType: ("__name__", "__self__"),
    types.FunctionType: ("__code__", "__defaults__", "__kwdefaults__", "__closure__", "__dict__"),
    types.CellType: ("cell_contents",),
    types.CodeType: (
        "co_code", "co_exceptiontable", "co_flags", "co_argcount", "co_posonlyargcount", "co_kwonlyargcount",
        "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_consts",
    ),
    **dict.fromkeys(
        (*_C_METHODS, types.GetSetDescriptorType, types.MemberDescriptorType), ("__name__", "__objclass__")
    ),
}  # fmt: skip
"""Types whose values are described by these attributes; a missing one counts as `None`."""

_NAMEDTUPLE_FIELD = type(vars(collections.namedtuple("_Of", "one"))["one"])
_SENTINELS = (dataclasses.MISSING, getattr(dataclasses, "_HAS_DEFAULT_FACTORY", dataclasses.MISSING))
_STATELESS = (object, abc.ABC, typing.Generic, typing.Protocol)
"""Base classes whose objects have no state besides their attributes."""

_UNPREDICTABLE = ("__import__", "eval", "exec", "globals", "input", "open")
"""Builtins whose effect depends on more than their arguments."""

_GLOBAL_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")

_IGNORED_MEMBERS = (
    "__abstractmethods__", "__annotate__", "__annotate_func__", "__annotations__", "__annotations_cache__",
    "__dataclass_params__", "__doc__", "__firstlineno__", "__module__", "__orig_bases__", "__parameters__",
    "__static_attributes__", "__type_params__", "_abc_impl",
)  # fmt: skip
"""Attributes of a class that Python writes itself, and that have no effect on what it does."""


class Unknown(TypeError):
    """A value cannot be described, so that the function has no digest; the message names it."""


def fingerprint(*values: Any) -> str:
    """Returns a hexadecimal digest of values and of all code that functions among them can reach.

    Functions count with their code, defaults, closures, attributes and the globals they name; classes with
    their bases and members; dataclasses and collections with their fields and items.

    Raises:
        Unknown: For a value of another type, such as a tensor or an object in a closure, and for code that
            imports, evaluates, or uses a module for anything but its attributes.
    """
    try:
        return _digest(values, {})
    except (ImportError, RecursionError, ValueError) as error:
        raise Unknown("a module, a collection within itself, or a cell without content") from error


def _digest(value: Any, seen: dict[int, int]) -> str:
    digest = hashlib.sha256()
    _describe(value, seen, lambda text: digest.update(text.encode() + b"\0"))
    return digest.hexdigest()


def _describe(value: Any, seen: dict[int, int], write: Callable[[str], None]) -> None:
    """Writes text that differs for different values; `seen` numbers functions and classes seen before."""
    write(type(value).__name__)
    if type(value) in _BY_REPR:
        write(repr(value))
    elif id(value) in seen:  # functions may call each other
        write(f"seen {seen[id(value)]}")
    elif type(value) in (set, frozenset):
        write(" ".join(sorted(_digest(item, dict(seen)) for item in value)))
    else:
        if isinstance(value, (types.FunctionType, type)):
            seen[id(value)] = len(seen)
        for part in _parts(value):
            if isinstance(part, str):
                write(part)
            else:
                _describe(part[0], seen, write)


def _parts(value: Any) -> Iterator[str | tuple[Any]]:
    """Yields text, and in tuples of one the values that are described next."""
    if isinstance(value, tuple):
        yield str(len(value))
        yield from ((item,) for item in value)
        if type(value) is not tuple:
            yield from ((type(value),), (getattr(value, "__dict__", None),))
    elif type(value) is list:
        yield (tuple(value),)
    elif type(value) in (dict, types.MappingProxyType):
        yield (tuple(item for pair in value.items() for item in pair),)
    elif any(value is sentinel for sentinel in _SENTINELS):
        yield "no value"
    elif type(value) is _NAMEDTUPLE_FIELD:
        yield (value.__reduce__()[1],)
    elif isinstance(value, types.BuiltinFunctionType):
        yield from _builtin(value)
    elif isinstance(value, _C_METHODS) and not _foreign(value.__objclass__):
        raise Unknown(f"{value!r} is not written in Python")
    elif type(value) in _BY_ATTRIBUTES:
        yield from _attributes(value)
    elif _foreign(value):
        yield _name(value)
    elif isinstance(value, type):
        members = {name: item for name, item in vars(value).items() if name not in _IGNORED_MEMBERS}
        yield _name(value)
        yield from ((type(value),), (value.__bases__,), (tuple(sorted(members)),))
        yield from ((item,) for _, item in sorted(members.items(), key=lambda member: member[0]))
    elif typing.get_origin(value) is not None:
        yield from ((typing.get_origin(value),), (typing.get_args(value),))
    elif dataclasses.is_dataclass(value):
        yield from ((type(value),), (_state(value),))
    else:
        raise Unknown(f"{value!r} of {type(value)}")


def _builtin(value: Any) -> Iterator[str | tuple[Any]]:
    owner = value.__self__
    module = owner.__name__ if isinstance(owner, types.ModuleType) else value.__module__
    if module is None and owner is not None:  # a method of this object
        yield from (value.__name__, (owner,))
    elif _is_foreign(module) and value.__name__ not in _UNPREDICTABLE:
        yield f"{module}.{value.__qualname__}"
    else:
        raise Unknown(f"{value!r} of {module}")


def _attributes(value: Any) -> Iterator[str | tuple[Any]]:
    yield from ((getattr(value, name, None),) for name in _BY_ATTRIBUTES[type(value)])
    if isinstance(value, types.FunctionType):
        yield _name(value)
        if not value.__code__.co_filename.startswith(_foreign_files()):  # names could be copied from another
            yield from _named(value)


def _named(function: Any) -> Iterator[str | tuple[Any]]:
    """Yields the globals and builtins that a function names, and the attributes it takes of modules."""
    builtins: Any = function.__builtins__
    for path in _globals(function.__code__):
        yield " ".join(path)
        name, *attributes = path
        for namespace in (function.__globals__, builtins):
            if name in namespace:
                yield (_attribute(namespace[name], attributes),)
                break


def _attribute(value: Any, names: list[str]) -> Any:
    for name in names:
        if isinstance(value, types.ModuleType):
            value = getattr(value, name, dataclasses.MISSING)
    return value


@functools.cache
def _globals(code: types.CodeType) -> list[tuple[str, ...]]:
    """Returns the globals that code names, each with the chain of attributes that follows."""
    paths: set[tuple[str, ...]] = set()
    path: tuple[str, ...] = ()
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            raise Unknown(f"{code.co_name} imports {instruction.argval}")
        if path and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            path = (*path, str(instruction.argval))
        elif instruction.opname != "EXTENDED_ARG":
            paths |= {path} - {()}
            path = (str(instruction.argval),) if instruction.opname in _GLOBAL_LOADS else ()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            paths |= set(_globals(constant))
    return sorted(paths)


def _state(value: Any) -> dict[str, Any]:
    """Returns the values in the slots and the dictionary of an object."""
    kinds = type(value).__mro__
    if any(_foreign(kind) and kind not in _STATELESS for kind in kinds):
        raise Unknown(f"{value!r} of {type(value)}")
    members = [item for kind in kinds for item in vars(kind).items()]
    slots = [name for name, item in members if isinstance(item, types.MemberDescriptorType)]
    values = {name: getattr(value, name, dataclasses.MISSING) for name in slots}
    return {**values, **getattr(value, "__dict__", {})}


@functools.cache
def _foreign_files() -> tuple[str, ...]:
    """Returns the files of the modules of `FOREIGN`, and the folders of its packages."""
    files = [getattr(importlib.import_module(name), "__file__", None) for name in FOREIGN]
    return tuple(file.removesuffix("__init__.py") for file in files if file)


def _is_foreign(module: Any) -> bool:
    return isinstance(module, str) and module.lstrip("_").partition(".")[0] in FOREIGN


def _foreign(value: Any) -> bool:
    """Returns whether a module of `FOREIGN` has this value under its qualified name."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not _is_foreign(module) or not isinstance(name, str):
        return False
    target: Any = sys.modules.get(str(module))
    for part in name.split("."):
        target = getattr(target, part, None)
    return target is value


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
