"""The table of a batch: kept while nothing changes, never from a graph's capture, never across streams."""

from types import SimpleNamespace

import pytest
import torch

from fastreg.engine import table as table_module
from fastreg.engine.batch import Batch
from fastreg.engine.stage import Chain
from fastreg.engine.table import Table
from fastreg.runtime import device


@pytest.fixture
def gpu(monkeypatch):
    """CPU tensors, and what a GPU would say of its current stream; counts uploads."""
    state = SimpleNamespace(stream="main", capturing=False, uploads=[])

    def upload(host, where):
        state.uploads.append(tuple(host.shape))
        return host.clone()

    monkeypatch.setattr(table_module, "upload", upload)
    monkeypatch.setattr(table_module, "stream", lambda where: state.stream)
    monkeypatch.setattr(table_module, "capturing", lambda where: state.capturing)
    monkeypatch.setattr(device, "_captured", kept := [])
    state.kept = kept
    return state


@pytest.fixture
def batch():
    tensors = [torch.zeros(5), torch.zeros(9000)]
    none = [0, 0]
    return Batch(Chain(()), tensors, tensors, [], [], [], none, none, none, [1], [[]])


def refreshed(table: Table, batch: Batch) -> tuple:
    table.refresh(batch)
    return table.rows, table.work(4096), table.work(16384)


def same(first: tuple, second: tuple) -> bool:
    return all(a is b for a, b in zip(first, second, strict=True))


def test_is_uploaded_once(gpu, batch):
    table = Table()
    first = refreshed(table, batch)
    assert same(first, refreshed(table, batch)) and len(gpu.uploads) == 3
    assert first[1].tolist() == [[0, 0], [1, 0], [1, 1], [1, 2]] and first[2].tolist() == [[0, 0], [1, 0]]


def test_a_size_that_changes_is_seen(gpu, batch):
    table = Table()
    refreshed(table, batch)
    batch.parameters = batch.gradients = [torch.zeros(5), torch.zeros(4096)]
    assert refreshed(table, batch)[1].tolist() == [[0, 0], [1, 0]]


def test_a_graph_may_read_what_is_there_and_it_is_kept_for_good(gpu, batch):
    """The usual way: steps to warm up, then the capture."""
    table = Table()
    first = refreshed(table, batch)
    gpu.capturing, gpu.stream = True, "capture"
    assert same(first, refreshed(table, batch))
    assert all(any(kept is tensor for kept in gpu.kept) for tensor in first)


def test_nothing_uploaded_in_a_capture_serves_a_later_step(gpu, batch):
    """It would be garbage until the graph is replayed."""
    table = Table()
    gpu.capturing = True
    captured = refreshed(table, batch)
    again = refreshed(table, batch)  # a second step in the same or in another graph
    assert not any(a is b for a in captured for b in again)
    gpu.capturing = False
    later = refreshed(table, batch)
    assert not any(a is b for a in (*captured, *again) for b in later)
    assert same(later, refreshed(table, batch))


def test_a_work_list_first_needed_in_a_capture_is_not_kept(gpu, batch):
    table = Table()
    table.refresh(batch)
    gpu.capturing = True
    table.refresh(batch)
    captured = table.work(4096)
    gpu.capturing = False
    table.refresh(batch)
    assert table.work(4096) is not captured and table.work(4096) is table.work(4096)


def test_another_stream_has_a_table_of_its_own(gpu, batch):
    """What one stream uploads may not be there yet for another, and is freed for the first one alone."""
    table = Table()
    first = refreshed(table, batch)
    gpu.stream = "side"
    other = refreshed(table, batch)
    assert not any(a is b for a in first for b in other)
    assert same(other, refreshed(table, batch))
