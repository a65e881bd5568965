"""Compiled programs: what they consist of, and that later processes use them, but none that is stale."""

import importlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fastreg
from fastreg.engine.launch import compiled
from fastreg.reference import rules
from fastreg.runtime import programs
from fastreg.runtime.compile_ahead import compile_ahead, compile_unguarded

N = 1009


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTREG_CACHE_DIR", str(tmp_path))
    return tmp_path / "programs"


def replace_compiler(monkeypatch, compiler):
    """The module is named as its function, which `import` would give."""
    module = importlib.import_module("fastreg.runtime.compile_ahead")
    monkeypatch.setattr(module, "compile_unguarded", compiler)


def body(tensors, scale):
    p, g = tensors
    p.mul_(0.5).add_(g * scale)
    return p.sum(), (p * 2, g + 1)


def examples():
    return [torch.randn(N), torch.randn(N)], torch.tensor(3.0)


def check(program):
    """Against the plain function, for another size."""
    (p, g), scale = [torch.randn(77), torch.randn(77)], torch.tensor(2.0)
    mine, theirs = [p.clone(), g.clone()], [p.clone(), g.clone()]
    version = mine[0]._version
    torch.testing.assert_close(program(mine, scale), body(theirs, scale))
    torch.testing.assert_close(mine, theirs)
    assert mine[0]._version > version and mine[1]._version == 0


def test_is_captured_saved_and_loaded(folder, monkeypatch):
    made = compile_ahead(body, examples())
    assert isinstance(made, programs.Program)
    check(made)
    assert programs.disk_usage()[0] == 1 and programs.disk_usage()[1] > 1000
    replace_compiler(monkeypatch, lambda *_: pytest.fail("compiled again"))
    loaded = compile_ahead(body, examples())
    assert loaded is not made
    check(loaded)
    assert (loaded.order, loaded.written, loaded.results) == (made.order, made.written, made.results)
    assert loaded.written == [0] and loaded.results == [0, [1, 2]]


def test_what_is_damaged_is_compiled_again(folder, monkeypatch):
    program = compile_ahead(body, examples())
    (file,) = folder.glob("*/program.json")
    whole = json.loads(file.read_text())
    for damaged in ("{", "{}", json.dumps({**whole, "libraries": {"call": "missing.so"}})):
        file.write_text(damaged)
        assert programs.load(file.parent.name) is None
    file.write_text(json.dumps(whole))
    assert programs.load(file.parent.name) is not None
    library = file.parent / "0.so"
    content = library.read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[:-1] + b"?"):
        library.unlink()  # it is mapped into this process
        library.write_bytes(damaged)
        assert programs.load(file.parent.name) is None
    replace_compiler(monkeypatch, lambda *_: program)
    monkeypatch.setattr(programs, "capture", lambda *_: program)
    monkeypatch.setattr(program, "libraries", {name: str(folder / "whole.so") for name in program.libraries})
    (folder / "whole.so").write_bytes(content)
    assert compile_ahead(body, examples()) is program
    check(programs.load(file.parent.name))  # it is kept instead of the damaged one
    assert [path.name for path in folder.iterdir() if path.is_dir()] == [file.parent.name]


def test_what_others_may_have_written_is_not_run(folder, monkeypatch):
    compile_ahead(body, examples())
    (file,) = folder.glob("*/program.json")
    key, made = file.parent.name, file.parent
    for path in (made, file, made / "0.so"):
        mode = path.stat().st_mode
        path.chmod(0o666 | mode)
        assert programs.load(key) is None, path
        path.chmod(mode)
        moved = path.rename(folder / "moved")
        path.symlink_to(moved)
        assert programs.load(key) is None, path
        path.unlink()
        moved.rename(path)
        assert programs.load(key) is not None
    inner = os.lstat
    for owner, trusted in ((0, True), (os.getuid(), True), (4321, False)):

        def owned(self, owner=owner):
            status = inner(self)
            return os.stat_result((*status[:4], owner, *status[5:10]))

        with monkeypatch.context() as changed:
            changed.setattr(type(file), "lstat", owned)
            assert (programs.load(key) is not None) == trusted, owner


def test_a_folder_that_cannot_be_read_keeps_nothing(folder, monkeypatch):
    """Such as that of another user: what is needed is compiled, and no error is made of it."""
    program = compile_ahead(body, examples())

    def refused(self):
        raise PermissionError(13, "Permission denied", str(self))

    for name in ("lstat", "is_file", "exists"):
        monkeypatch.setattr(type(folder), name, refused)
    replace_compiler(monkeypatch, lambda *_: program)
    monkeypatch.setattr(programs, "capture", lambda *_: program)
    assert compile_ahead(body, examples()) is program
    assert programs.disk_usage() == (0, 0)


def test_where_they_are(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTREG_CACHE_DIR", "off")
    assert programs.folder() is None and programs.disk_usage() == (0, 0)
    monkeypatch.setenv("FASTREG_CACHE_DIR", "OFF")
    assert programs.folder() is None
    monkeypatch.setenv("FASTREG_CACHE_DIR", "~/kept")
    assert programs.folder() == Path.home() / "kept" / "programs"
    monkeypatch.delenv("FASTREG_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert programs.folder() == tmp_path / "fastreg" / "programs"


def test_a_folder_that_cannot_be_written_keeps_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTREG_CACHE_DIR", str(tmp_path / "file"))
    programs.save("key", programs.Program("def call(args):\n    return ()", {}, [], [], None))
    assert programs.disk_usage() == (0, 0) and not programs.writable()
    message = (
        f"no compiled steps: {tmp_path}/file/programs cannot be written, FASTREG_CACHE_DIR names another"
    )
    assert message in str(fastreg.info())


def test_a_key_for_every_difference(monkeypatch):
    """Code, dtypes, dimensions, threads, processor, versions, settings of Inductor."""
    keys = [programs.key(body, examples())]
    assert programs.key(body, examples()) == keys[0]
    keys.append(programs.key(lambda tensors, scale: None, examples()))
    keys.append(programs.key(body, ([torch.randn(N).double(), torch.randn(N)], torch.tensor(3.0))))
    keys.append(programs.key(body, ([torch.randn(N, 1), torch.randn(N)], torch.tensor(3.0))))
    with monkeypatch.context() as changed:
        changed.setattr(torch, "get_num_threads", lambda: 77)
        keys.append(programs.key(body, examples()))
    with monkeypatch.context() as changed:
        changed.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX1024")
        keys.append(programs.key(body, examples()))
    with monkeypatch.context() as changed:
        changed.setattr(torch, "__version__", "9.9.9")
        keys.append(programs.key(body, examples()))
    with monkeypatch.context() as changed:
        changed.setenv("TORCHINDUCTOR_CPP_SIMDLEN", "1")
        keys.append(programs.key(body, examples()))
    with monkeypatch.context() as changed:
        changed.setattr(torch, "get_default_dtype", lambda: torch.float64)
        keys.append(programs.key(body, examples()))
    with importlib.import_module("torch._inductor.config").patch({"cpp.simdlen": 1}):
        keys.append(programs.key(body, examples()))
    assert None not in keys and len(set(keys)) == len(keys)


def test_what_torch_compiles_otherwise_is_used_as_it_is(folder, monkeypatch):
    """Two modules, another name in the function, an argument of unknown origin: nothing is kept."""
    arguments = examples()
    function = compile_unguarded(body, arguments)
    written = programs.modules()[-1:]
    assert isinstance(programs.capture(function, arguments, written), programs.Program)
    for wrong in ([], [*written, *written]):
        with pytest.raises(programs.Unexpected, match="modules instead of one"):
            programs.capture(function, arguments, wrong)
    with pytest.raises(programs.Unexpected, match="neither a tensor nor a size"):
        programs.capture(lambda *_: function(*examples()), arguments, written)
    with pytest.raises(programs.Unexpected, match="was not called"):
        programs.capture(lambda *_: None, arguments, written)
    with pytest.raises(programs.Unexpected, match="made after it"):
        programs.capture(lambda *a: function(*a)[0] + 1, arguments, written)
    monkeypatch.setattr(programs, "_ALLOCATING", ())
    with pytest.raises(programs.Unexpected, match="empty_strided_cpu> has no library"):
        programs.capture(function, arguments, written)
    function = compile_ahead(body, arguments)
    assert not isinstance(function, programs.Program) and programs.disk_usage() == (0, 0)


def test_what_cannot_be_known_again_is_not_kept(folder):
    outer = torch.ones(())
    function = compile_ahead(lambda tensors, scale: tensors[0] * scale + outer, examples())
    assert not isinstance(function, programs.Program) and programs.disk_usage() == (0, 0)


def test_an_edited_stage_has_another_key(monkeypatch):
    """Whatever a chain's reference reaches counts, by the code that is loaded, not by its file."""
    keys = []
    monkeypatch.setattr(compiled, "compile_ahead", lambda *arguments: keys.append(programs.key(*arguments)))

    def noted():
        compiled.compiled_step.cache_clear()
        p = torch.nn.Parameter(torch.ones(4))
        optimizer = fastreg.SGD([p], lr=0.1, momentum=0.9)
        chain = optimizer.chain(optimizer.param_groups[0], torch.float32)
        compiled.compiled_step(chain, (torch.float32,) * 3, torch.float32, torch.device("cpu"), 1)

    try:
        noted()
        noted()
        edited = rules.sgd_momentum.__code__.replace(
            co_consts=(*rules.sgd_momentum.__code__.co_consts, 123.0)
        )
        monkeypatch.setattr(rules.sgd_momentum, "__code__", edited)
        noted()
    finally:
        compiled.compiled_step.cache_clear()
    assert keys[0] == keys[1] != keys[2] and None not in keys


STAGES = """
def halved(p, u, at):
    return p - {factor} * u, u, ()
"""
STEP = """
    import sys, time, torch, fastreg
    from fastreg.engine.stage import Chain, Stage
    from fastreg.engine.batch import Batch
    from fastreg.engine.launch import run

    sys.path.insert(0, sys.argv[1])
    from stages import halved

    compiles = []
    ahead = sys.modules["fastreg.runtime.compile_ahead"]
    inner = ahead.compile_unguarded
    ahead.compile_unguarded = lambda *arguments: compiles.append(1) or inner(*arguments)
    ones = [torch.ones(100), torch.ones(33)]
    batch = Batch(
        Chain((Stage(None, halved),)), [t.clone() for t in ones], ones, [], [], [],
        [0, 0], [0, 1], [0, 0], [1], [[]],
    )
    with fastreg.use_backend("compiled"):
        run(batch)
    print(len(compiles), float(batch.parameters[0][3]))
"""


@pytest.mark.slow
def test_a_stale_program_is_never_used(tmp_path):
    """A stage is edited between two processes, and back again."""
    outputs = []
    for factor in ("0.5", "0.25", "0.5"):
        (tmp_path / "stages.py").write_text(STAGES.format(factor=factor))
        outputs.append(process(STEP, tmp_path, str(tmp_path)))
    assert outputs == ["1 0.5", "1 0.75", "0 0.5"]


FIRST = """
    import time, torch, fastreg
    p = torch.nn.Parameter(torch.randn(2_000_000))
    p.grad = torch.randn(2_000_000)
    regularizers = [fastreg.ClipNorm(1.0), fastreg.GradientNoise(0.01), fastreg.EMA(0.9)]
    optimizer = fastreg.AdamW([p], regularizers=regularizers, seed=0)
    start = time.perf_counter()
    optimizer.step()
    print(time.perf_counter() - start)
"""


@pytest.mark.slow
def test_the_first_step_of_a_second_process_takes_less_than_a_second(tmp_path):
    first, second = (float(process(FIRST, tmp_path)) for _ in range(2))
    assert second < 1 < first


def process(code, cache, *arguments):
    environment = {**os.environ, "FASTREG_CACHE_DIR": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
