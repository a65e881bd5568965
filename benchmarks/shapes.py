"""Parameter shapes of models, as data."""

from __future__ import annotations


def gpt2(
    layers: int = 12, width: int = 768, vocabulary: int = 50257, positions: int = 1024
) -> list[tuple[int, ...]]:
    """GPT-2: 124 M parameters in 148 tensors by default."""
    block = [
        (width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,),
        (width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), (positions, width), *block * layers, (width,), (width,)]
