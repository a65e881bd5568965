"""Fixtures of the tests of operators."""

import pytest
import torch

import fastreg


@pytest.fixture
def x():
    return torch.randn(37, 11, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def reference():
    """Compiling takes seconds; `tests/kernels` compares the backends."""
    with fastreg.use_backend("reference"):
        yield


@pytest.fixture
def counting():
    """The graphs that a compiler was given so far, and the compiler."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph

    return graphs, compiler
