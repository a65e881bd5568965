"""Functions of tensors through `torch.compile`: compiled ahead of time, for any length, and kept on disk."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import torch

from . import programs

LENGTH = 2**20 + 7
"""An example of a length: equal to no other size, and long enough for Inductor to use all threads."""


def compile_ahead(function: Callable[..., Any], examples: tuple[Any, ...]) -> Callable[..., Any]:
    """A function of tensors, compiled for those of other sizes too; what a former process compiled is used.

    No guard is checked: the caller sees to it that dtypes, devices, dimensions and the number of threads are
    those of the examples, that no size is 0 or 1, and that no plain number is among the arguments.

    Args:
        function: It takes tensors and lists of tensors.
        examples: Arguments whose sizes are equal only where they always are; contiguous.
    """
    key = programs.key(function, examples)
    if key is None:
        return _compiled(function, examples)
    found = programs.load(key)
    if found is not None:
        return found
    before = programs.modules()
    compiled = _compiled(function, examples)
    try:
        program = programs.capture(compiled, examples, programs.modules()[len(before) :])
    except programs.Unexpected:
        return compiled
    programs.save(key, program)
    return program


def _compiled(function: Callable[..., Any], examples: tuple[Any, ...]) -> Callable[..., Any]:
    options: dict[str, Any] = {
        "size_asserts": False,
        "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
    }
    # Called through Dynamo, a step would spend 50 µs on each tensor; compiled ahead and unguarded, 12.
    with _ahead_of_time(), torch.no_grad():
        compiled = torch.compile(function, dynamic=True, fullgraph=True, options=options)
        ahead = compiled.aot_compile((examples, {}))  # type: ignore[attr-defined]
    ahead.disable_guard_check()
    return ahead


def _ahead_of_time() -> contextlib.AbstractContextManager[Any]:
    """Within the block torch compiles ahead of time, which torch 2.11 does only where it is told to.

    Numbers stay numbers: torch 2.11 would start anew where it cannot make tensors of them, which fails there.
    """
    config = importlib.import_module("torch._dynamo.config")
    wanted = {"enable_aot_compile": True, "specialize_float": True}
    return config.patch({name: value for name, value in wanted.items() if hasattr(config, name)})
