"""Writes results of commands as JSON."""

import json
import math
import os
from pathlib import Path
from typing import Any


def write(path: Path, document: dict[str, Any]) -> None:
    """Writes a document completely or not at all; NaN and infinity become `null`, as JSON lacks them."""
    text = json.dumps(_finite(document), indent=1, allow_nan=False, ensure_ascii=False)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
