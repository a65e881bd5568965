"""Finds the kernel entry points of `fastreg_kernels`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import fastreg_kernels


def entry_points() -> dict[str, Any]:
    """Returns every kernel of `fastreg_kernels` that is launched, by name."""
    kernels = {}
    for module in pkgutil.iter_modules(fastreg_kernels.__path__):
        members = vars(importlib.import_module(f"fastreg_kernels.{module.name}"))
        kernels |= {name: value for name, value in members.items() if name.endswith("_kernel")}
    return kernels
