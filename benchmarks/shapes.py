"""Parameter shapes of models, as data."""

from __future__ import annotations

import random

Sizes = list[tuple[int, ...]]


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257, positions: int = 1024) -> Sizes:
    """GPT-2: 124 M parameters in 148 tensors by default."""
    block = [
        (width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,),
        (width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), (positions, width), *block * layers, (width,), (width,)]


def llama(layers: int = 16, width: int = 2048, inner: int = 8192, vocabulary: int = 128256) -> Sizes:
    """Llama 3.2 1B: 1.24 G parameters in 146 tensors by default, embeddings tied."""
    keys = width // 4  # four queries share one
    block = [
        (width, width), (keys, width), (keys, width), (width, width),
        (inner, width), (inner, width), (width, inner), (width,), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), *block * layers, (width,)]


def many_small(count: int = 1000) -> Sizes:
    """Between 1 and 64 k elements each, 32 M in all: what a launch or a Python call per tensor costs."""
    return [(random.Random(i).randint(1, 2**16),) for i in range(count)]


def one_huge(elements: int = 2**28) -> Sizes:
    """One tensor: nothing but bandwidth."""
    return [(elements,)]
