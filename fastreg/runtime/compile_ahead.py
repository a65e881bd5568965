"""Compiles functions of tensors ahead of time for all sizes, and keeps them on disk."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from . import programs

LENGTH = 2**20 + 7
"""An example of a length: equal to no other size, and long enough for Inductor to use all threads."""


def compile_ahead(function: Callable[..., Any], examples: tuple[Any, ...]) -> Callable[..., Any]:
    """Returns a function compiled for tensors of all sizes, from disk if another process has compiled it.

    No guard is checked.  The caller ensures that arguments are tensors and lists of tensors, with dtypes,
    devices, dimensions and the number of threads of the examples, and that no size is 0 or 1.  Examples are
    contiguous, and their sizes are equal only where they always are.
    """
    key = programs.key(function, examples)
    if key is None:
        return compile_unguarded(function, examples)
    program = programs.load(key)
    if program is not None:
        return program
    before = programs.modules()
    compiled = compile_unguarded(function, examples)
    try:
        program = programs.capture(compiled, examples, programs.modules()[len(before) :])
    except programs.Unexpected:
        return compiled
    programs.save(key, program)
    return program


def compile_unguarded(function: Callable[..., Any], examples: tuple[Any, ...]) -> Callable[..., Any]:
    """Compiles a function by `torch.compile` ahead of time, without guards; see `compile_ahead`."""
    options: dict[str, Any] = {
        "size_asserts": False,
        "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
    }
    # Torch 2.11 has to be told to compile ahead of time, and that numbers stay numbers: it would start again
    # where it cannot make tensors of them, and fail.
    config = importlib.import_module("torch._dynamo.config")
    settings = {"enable_aot_compile": True, "specialize_float": True}
    patch = config.patch({name: value for name, value in settings.items() if hasattr(config, name)})
    # Called through Dynamo, a step would spend 50 µs on each tensor; compiled ahead and unguarded, 12.
    with patch, torch.no_grad():
        compiled = torch.compile(function, dynamic=True, fullgraph=True, options=options)
        ahead = compiled.aot_compile((examples, {}))  # type: ignore[attr-defined]
    ahead.disable_guard_check()
    return ahead
