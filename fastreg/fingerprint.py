"""A digest of everything that a function would run, so that what was compiled of it can be known again.

It is taken of code and values as they are in this process, not of files: editing a file under a running
process, or replacing a function, changes or keeps it as it should.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import hashlib
import types
from collections.abc import Iterator
from typing import Any

import torch

FOREIGN = ("torch", "builtins", "math", "functools", "operator", "collections", "typing", "itertools")
"""Packages whose code does not change with ours: they count by name, and by their version elsewhere."""
_PLAIN = (bool, int, float, complex, str, bytes, slice, type(...))


class Unknown(TypeError):
    """Something whose effect on a function cannot be told; the message names it."""


def fingerprint(*values: Any) -> str:
    """A hexadecimal digest of values and of all code that functions among them can reach.

    Functions count with their code, defaults, closures and the globals they name; classes with their methods
    and constants; dataclasses and collections with what they hold.

    Raises:
        Unknown: For a value of another kind, such as a tensor or an object of a class in a closure.
    """
    digest = hashlib.sha256()
    for part in _described(values, {}):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _described(value: Any, seen: dict[Any, int]) -> Iterator[str]:
    yield type(value).__name__
    if value is None or isinstance(value, _PLAIN):
        yield repr(value)
    elif isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        yield str(value)
    elif isinstance(value, (types.FunctionType, type)) and value in seen:  # functions may call each other
        yield f"seen {seen[value]}"
    else:
        if isinstance(value, (types.FunctionType, type)):
            seen[value] = len(seen)
        for part in _parts(value):
            if isinstance(part, str):
                yield part
            else:
                yield from _described(part[0], seen)


def _parts(value: Any) -> Iterator[str | tuple[Any]]:
    """Text as it is, and what is to be described in turn in tuples of one."""
    if isinstance(value, (tuple, list)):
        yield str(len(value))
        yield from ((item,) for item in value)
    elif isinstance(value, (set, frozenset)):
        yield from sorted(map(repr, value))
    elif isinstance(value, dict):
        yield from ((item,) for pair in value.items() for item in pair)
    elif isinstance(value, functools.partial):
        yield from ((value.func,), (value.args,), (value.keywords,))
    elif isinstance(value, (staticmethod, classmethod)):
        yield (value.__func__,)
    elif isinstance(value, types.MethodType):
        yield from ((value.__func__,), (value.__self__,))
    elif isinstance(value, types.CodeType):
        yield value.co_code.hex()
        yield " ".join((*value.co_names, "|", *value.co_varnames, "|", *value.co_freevars))
        yield (value.co_consts,)
    elif _foreign(value):
        yield _name(value)
    elif isinstance(value, types.FunctionType):
        yield from _function(value)
    elif isinstance(value, type):
        yield f"{_name(value)} {getattr(value, '_fields', ())}"
        yield from ((member,) for member in _members(value))
    elif dataclasses.is_dataclass(value):
        yield (type(value),)
        yield from ((getattr(value, field.name),) for field in dataclasses.fields(value))
    else:
        raise Unknown(f"{value!r} of {type(value)}")


def _foreign(value: Any) -> bool:
    module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    if isinstance(value, types.BuiltinFunctionType):
        module = module or "builtins"
    return isinstance(module, str) and module.partition(".")[0] in FOREIGN and hasattr(value, "__name__")


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"


def _members(value: type) -> Iterator[Any]:
    """The methods, properties and constants of a class, less what Python writes itself."""
    for name, item in sorted(vars(value).items()):
        item = item.fget if isinstance(item, property) else getattr(item, "__func__", item)
        if isinstance(item, types.FunctionType):
            written = item.__code__.co_filename != "<string>"
            if written and (name in ("__init__", "__new__", "__call__") or not name.startswith("__")):
                yield item
        elif isinstance(item, _PLAIN) and not name.startswith("__"):
            yield name, item


def _function(value: types.FunctionType) -> Iterator[str | tuple[Any]]:
    yield _name(value)
    yield from ((value.__code__,), (value.__defaults__,), (value.__kwdefaults__,))
    yield from ((cell.cell_contents,) for cell in value.__closure__ or ())
    for name, *attributes in sorted(set(_globals(value.__code__))):
        if name in value.__globals__:
            found = value.__globals__[name]
            for attribute in attributes:  # of a module of ours, what the function takes from it
                if isinstance(found, types.ModuleType) and not _foreign(found):
                    found = getattr(found, attribute, None)
            yield " ".join((name, *attributes))
            yield (found,)


def _globals(code: types.CodeType) -> Iterator[tuple[str, ...]]:
    """The globals that code names, each with the attributes that are taken of it at once."""
    path: list[str] = []
    for instruction in dis.get_instructions(code):
        if path and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            path.append(str(instruction.argval))
            continue
        if path:
            yield tuple(path)
        path = [str(instruction.argval)] if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") else []
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals(constant)
