"""Parameter shapes of the models that benchmarks step over."""

from __future__ import annotations

import random

Sizes = list[tuple[int, ...]]


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257, positions: int = 1024) -> Sizes:
    """Returns the shapes of GPT-2: 124 M parameters in 148 tensors by default."""
    block = [
        (width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,),
        (width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), (positions, width), *block * layers, (width,), (width,)]


def llama(layers: int = 16, width: int = 2048, inner: int = 8192, vocabulary: int = 128256) -> Sizes:
    """Returns the shapes of Llama 3.2 1B: 1.24 G parameters in 146 tensors by default, embeddings tied."""
    keys = width // 4  # four query heads share one key head
    block = [
        (width, width), (keys, width), (keys, width), (width, width),
        (inner, width), (inner, width), (width, inner), (width,), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), *block * layers, (width,)]


def many_small(count: int = 1000) -> Sizes:
    """Returns shapes of 1 to 64 k elements, 32 M in all by default; always the same ones.

    They show the cost of a launch or a Python call per tensor.
    """
    return [(random.Random(i).randint(1, 2**16),) for i in range(count)]


def one_huge(elements: int = 2**28) -> Sizes:
    """Returns the shape of a single tensor, whose step depends on bandwidth alone."""
    return [(elements,)]
