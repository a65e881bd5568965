"""Which backend runs a step, who decides, and what happens when it cannot."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch.nn import Parameter

import fastreg
from fastreg.engine.launch import eager
from fastreg.runtime import backend

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_at_first(monkeypatch):
    """Nothing is forced and compiling has not failed yet."""
    monkeypatch.delenv("FASTREG_BACKEND", raising=False)
    monkeypatch.setattr(backend, "override", None)
    monkeypatch.setattr(backend, "_compiles", True)


@pytest.fixture
def cannot_compile(monkeypatch):
    """Every attempt to compile, which fails."""
    attempts = []

    def fails(*key):
        attempts.append(key)
        raise RuntimeError("no room on the disk")

    monkeypatch.setattr(eager, "compiled_step", fails)
    return attempts


def weights(*sizes, dtype=torch.float32):
    made = [Parameter(torch.ones(size, dtype=dtype)) for size in sizes]
    for p in made:
        p.grad = torch.ones_like(p)
    return made


def test_as_a_function():
    assert backend.forced() == "auto"
    fastreg.use_backend("reference")
    assert backend.forced() == "reference"
    fastreg.use_backend("auto")
    assert backend.forced() == "auto"


def test_as_a_context():
    fastreg.use_backend("compiled")
    with fastreg.use_backend("reference"):
        with pytest.raises(ZeroDivisionError), fastreg.use_backend("triton"):
            assert backend.forced() == "triton"
            1 / 0  # noqa: B018
        assert backend.forced() == "reference"
    assert backend.forced() == "compiled"


def test_unknown_name(monkeypatch):
    message = "must be 'auto', 'triton', 'compiled' or 'reference', got 'cuda'"
    with pytest.raises(ValueError, match=message):
        fastreg.use_backend("cuda")
    assert backend.forced() == "auto"
    monkeypatch.setenv("FASTREG_BACKEND", "cuda")
    with pytest.raises(ValueError, match=f"FASTREG_BACKEND {message}"):
        fastreg.SGD(weights(3)).step()


@pytest.mark.parametrize("value, forced", (("reference", "reference"), ("auto", "auto"), ("", "auto")))
def test_environment(monkeypatch, value, forced):
    monkeypatch.setenv("FASTREG_BACKEND", value)
    assert backend.forced() == forced
    with fastreg.use_backend("compiled"):
        assert backend.forced() == "compiled"
    assert backend.forced() == forced


def test_environment_of_a_process():
    code = """if True:
        import torch, fastreg
        weight = torch.nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        fastreg.SGD([weight], lr=1.0).step()"""
    environment = {**os.environ, "FASTREG_BACKEND": "triton", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    assert "RuntimeError: backend 'triton' cannot run on cpu tensors: set TRITON_INTERPRET=1" in run.stderr


@pytest.mark.parametrize(
    "elements, expected", ((0, "reference"), (999_999, "reference"), (1_000_000, "compiled"))
)
def test_auto_on_a_cpu(elements, expected):
    assert backend.resolve(CPU, elements) == expected


def test_auto_counts_all_parameters_of_a_step(monkeypatch):
    compiled = []
    monkeypatch.setattr(eager, "compiled_step", lambda *key: compiled.append(key) or (lambda *_: None))
    for sizes, expected in (((600_000, 399_999), 0), ((600_000, 400_000), 1)):
        fastreg.SGD(weights(*sizes)).step()
        assert len(compiled) == expected


def test_auto_without_compiler(monkeypatch):
    monkeypatch.setattr(backend, "has_compiler", lambda: False)
    assert backend.resolve(CPU, 10**9) == "reference"


@pytest.mark.parametrize("kind, expected", (("cuda", "triton"), ("mps", "reference"), ("meta", "reference")))
def test_auto_elsewhere(monkeypatch, kind, expected):
    assert backend.resolve(torch.device(kind), 10**9) == expected
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert backend.resolve(torch.device(kind), 10**9) == "reference"


@pytest.mark.parametrize("kind, interpreted, installed, reason", (
    ("cpu", None, True, "cpu tensors: set TRITON_INTERPRET=1"),
    ("cpu", "0", True, "cpu tensors: set TRITON_INTERPRET=1"),
    ("cpu", "1", False, "cpu tensors: triton is not installed"),
    ("cuda", None, False, "cuda tensors: triton is not installed"),
    ("mps", "1", True, "mps tensors: only CUDA and ROCm"),
))  # fmt: skip
def test_no_triton(monkeypatch, kind, interpreted, installed, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if interpreted is not None:
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    monkeypatch.setattr(backend, "has_triton", lambda: installed)
    with fastreg.use_backend("triton"), pytest.raises(RuntimeError, match=f"'triton' cannot run on {reason}"):
        backend.resolve(torch.device(kind), 1)


def test_triton_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with fastreg.use_backend("triton"):
        assert backend.resolve(CPU, 1) == "triton"


def test_compiled_without_compiler(monkeypatch):
    monkeypatch.setattr(backend, "has_compiler", lambda: False)
    (weight,) = weights(3)
    optimizer = fastreg.SGD([weight], lr=0.5)
    with fastreg.use_backend("compiled"):
        with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler on a CPU.*\$CXX, g\+\+"):
            optimizer.step()
        assert backend.resolve(torch.device("cuda"), 1) == "compiled"
    assert (weight == 1).all()
    optimizer.step()
    assert (weight == 0.5).all() and optimizer.state[weight]["step"] == 1


@pytest.mark.parametrize("name, variable", (("g++", None), ("clang++", None), ("my-c++", "my-c++")))
def test_finding_a_compiler(monkeypatch, tmp_path, name, variable):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not backend.has_compiler.__wrapped__()
    (tmp_path / name).write_text("#!/bin/sh\n")
    (tmp_path / name).chmod(0o755)
    if variable:
        assert not backend.has_compiler.__wrapped__()
        monkeypatch.setenv("CXX", variable)
    assert backend.has_compiler.__wrapped__()


def test_auto_falls_back_where_compiling_fails(monkeypatch, cannot_compile):
    """One warning, although two batches were to be compiled, and no second attempt at the next step."""
    monkeypatch.setattr(backend, "COMPILE_FROM", 4)
    parameters = [*weights(5), *weights(6, dtype=torch.float64)]
    optimizer = fastreg.SGD(parameters, lr=0.25, regularizers=[fastreg.ClipNorm(100.0)])
    with pytest.warns(RuntimeWarning, match="FASTREG_BACKEND=reference.* no room on the disk") as caught:
        optimizer.step()
    assert len(caught) == 1
    attempts = len(cannot_compile)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert len(cannot_compile) == attempts > 0
    assert all((p == 0.5).all() for p in parameters)


def test_forced_compiling_that_fails(cannot_compile):
    (weight,) = weights(5)
    optimizer = fastreg.SGD([weight], lr=0.25)
    for attempts in (1, 2):
        with fastreg.use_backend("compiled"), pytest.raises(RuntimeError, match="^no room on the disk$"):
            optimizer.step()
        assert len(cannot_compile) == attempts
    assert (weight == 1).all()
    optimizer.step()
    assert (weight == 0.75).all() and optimizer.state[weight]["step"] == 1


def test_changed_between_steps(Race):
    race = Race()
    ours, theirs = fastreg.AdamW(race.ours, lr=0.1), torch.optim.AdamW(race.theirs, lr=0.1)
    for name in ("reference", "triton", "compiled", "auto", "triton"):
        with fastreg.use_backend(name):
            race.step(ours, theirs)
    race.check()
