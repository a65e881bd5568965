"""`fastreg.info()` tells what is there and what would run, as the backend decides it."""

import json
from importlib.metadata import version

import pytest
import torch

import fastreg
from fastreg.cli import main
from fastreg.runtime import backend


def cpu():
    return next(device for device in fastreg.info().devices if device.name == "cpu")


def test_versions():
    versions = fastreg.info().versions
    assert versions["torch"] == version("torch") and versions["fastreg"] == version("fastreg")
    assert versions["triton"] == version("triton")


@pytest.mark.parametrize("name", ("auto", "reference", "compiled"))
def test_it_tells_what_would_run(name):
    with fastreg.use_backend(name):
        message, device = cpu().backend, torch.device("cpu")
        small, large = (backend.resolve(device, count) for count in (1, backend.COMPILE_FROM))
        assert fastreg.info().forced == name
    if small == large:
        assert message == f"{small}, as asked for"
    else:
        assert message == f"{large} from 1,000,000 elements on, {small} below"


def test_what_is_impossible_is_told(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with fastreg.use_backend("triton"):
        assert cpu().backend.startswith("impossible: backend 'triton' cannot run on cpu tensors: set TRITON")


def test_no_compiler(monkeypatch):
    backend.has_compiler.cache_clear()
    monkeypatch.setattr(backend, "compiler", lambda: None)
    try:
        assert cpu().backend == "reference: no C++ compiler, none of $CXX, g++, clang++, c++ found"
        assert "no C++ compiler" in cpu().hardware
    finally:
        backend.has_compiler.cache_clear()


def test_failed_compilation_is_told(monkeypatch):
    monkeypatch.setattr(backend, "_compiles", False)
    assert cpu().backend == "reference: compiling the step has failed in this process"


def test_the_command_prints_it(capsys):
    assert main(["info"]) == 0
    assert capsys.readouterr().out.strip() == str(fastreg.info())
    assert main(["info", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["versions"] == fastreg.info().versions
    assert shown["devices"][0]["backend"] == cpu().backend
