"""Kernels compiled ahead of time are the ones that a later process asks for, whatever it compiles first."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

import fastreg
from fastreg.cli import main
from fastreg.runtime import kernel_cache
from fastreg_benchmarks import chains, families, precompile, stub
from fastreg_benchmarks.entry_points import entry_points

WORK = ["clip+noise+AdamW+EMA", "penalty", "ghost"]
LATER = """
    import sys, triton
    from fastreg_benchmarks import precompile, recording, stub

    found = []
    triton.knobs.compilation.listener = lambda **seen: found.append(seen["cache_hit"])
    driver = recording.recording_driver() if "recording" in sys.argv else stub.stub_driver("sm_90")
    with driver:
        for item in reversed(precompile.items(sys.argv[1].split(","), ["fp32", "bf16"])):
            precompile.run(item)
    print(len(found), sum(found))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    work = precompile.items(WORK, ["fp32", "bf16"])
    filled = precompile.fill("sm_90", folder, work, jobs=2)
    assert not filled.failed and filled.kernels == filled.compiled == len(precompile.hashes(folder))
    return folder


def later(cache, names, *arguments):
    """Compilations that a fresh process asks for, and how many of them are there."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", textwrap.dedent(LATER), ",".join(names), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return tuple(map(int, done.stdout.split()))


@pytest.mark.parametrize("driver", [pytest.param("stub", marks=pytest.mark.slow), "recording"])
def test_a_fresh_process_compiles_nothing(cache, driver):
    asked, hits = later(cache, WORK, driver)
    assert asked == hits == len(precompile.hashes(cache))


def test_an_empty_cache_is_not_hit(tmp_path):
    asked, hits = later(tmp_path, ["Lion"])
    assert hits == 0 < asked


def test_only_what_a_run_needs_is_stored(cache):
    files = [file for made in cache.glob("*/*_kernel.json") for file in made.parent.iterdir()]
    assert {file.suffix for file in files} == {".json", ".cubin"}
    groups = [json.loads(file.read_text())["child_paths"] for file in cache.glob("*/__grp__*_kernel.json")]
    assert groups and all(os.path.isfile(path) for group in groups for path in group.values())


def test_what_others_have_compiled_is_left_alone(tmp_path):
    """Also a kernel of the same name, and what is not whole."""
    for folder, text in (("THEIRS", '{"hash": "abc"}'), ("HALF", "{")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "dropout_kernel.json").write_text(text)
        (tmp_path / folder / "dropout_kernel.source").write_text("theirs")
        (tmp_path / folder / "__grp__dropout_kernel.json").write_text('{"child_paths": {"a.source": "b"}}')
    before = {file: file.read_text() for file in tmp_path.glob("*/*")}
    filled = precompile.fill("sm_90", tmp_path, precompile.items(["dropout"], ["fp32"], [16]))
    assert filled.kernels == filled.compiled > 0 and not filled.failed
    assert {file: file.read_text() for file in before} == before


@pytest.mark.slow
def test_what_is_cached_adds_up(tmp_path, monkeypatch):
    for name in ("Lion", "SGD", "Lion"):
        precompile.fill("sm_90", tmp_path, precompile.items([name], ["fp32"]))
    (cached,) = kernel_cache.read(tmp_path)
    assert cached.kernels == len(precompile.hashes(tmp_path)) and cached.current
    monkeypatch.setattr(kernel_cache, "identity", lambda: "another")
    kernel_cache.add(tmp_path, "sm_90", {"1", "2"})
    assert kernel_cache.read(tmp_path) == [kernel_cache.Cached("sm_90", 2, True)]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_200", "gfx000"])
def test_a_target_that_the_compiler_dies_of(tmp_path, capfd, target):
    arguments = ["precompile", "--target", target, "--only", "SGD", "--dtype", "fp32", "--out", str(tmp_path)]
    assert main(arguments) == 1
    assert "did not compile" in capfd.readouterr().out and not kernel_cache.read(tmp_path)


def test_again_compiles_nothing(cache):
    filled = precompile.fill("sm_90", cache, precompile.items(["penalty"], ["fp32"]))
    assert filled.kernels and not filled.compiled


def test_keys_do_not_depend_on_what_came_before():
    """Triton adds globals of a called function to a key only if that one was compiled before (3.6 to 3.9)."""
    from triton.language.core import constexpr
    from triton.runtime.jit import JITFunction

    functions = {
        value for kernel in entry_points().values() for value in kernel.__globals__.values()
        if isinstance(value, JITFunction)
    } - set(entry_points().values())  # fmt: skip
    assert len(functions) > 40
    for function in functions:
        assert function.cache_key
        named = [
            name
            for (name, _), (value, _) in function.used_global_vals.items()
            if isinstance(value, constexpr)
        ]
        assert not named, f"{function.__name__} names {named}"


@pytest.mark.parametrize("chain", ["AdamW+Lookahead", "AdamW+pullback"])
def test_uninitialized_flags_skip_no_step(chain, monkeypatch):
    """If the first step counted as skipped, the second would not synchronise the slow weights."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # `torch.empty` holds NaN
    try:
        with stub.stub_driver():
            precompile.run(precompile.Item(chain, "fp32", "skip"))
            assert stub.variants()["step_kernel"] == 2  # where slow weights are due, and where they are not
    finally:
        torch.use_deterministic_algorithms(False)


def test_all_that_is_shipped_is_compiled_by_default():
    names = {item.family for item in precompile.items()}
    assert names == families.FAMILIES.keys() >= {c for c in chains.BUDGETS if "dp" not in c.split("+")}
    kinds = {(item.kind, item.nonfinite) for item in precompile.items(["AdamW"])}
    assert kinds == {(kind, what) for kind in chains.STORAGES for what in ("propagate", "skip")}
    items = precompile.items(["dropout"])
    assert {item.kind for item in items} == {"fp32", "bf16"}
    assert {item.features for item in items} == set(precompile.FEATURES)


def test_families_need_the_kernels_that_the_audit_reads():
    """All of them together launch every entry point."""
    with stub.stub_driver() as launches:
        for name in ("clip+noise+AdamW+EMA", "adaptive+SGD-momentum", *families.FAMILIES):
            if name not in chains.BUDGETS or name in ("clip+noise+AdamW+EMA", "adaptive+SGD-momentum"):
                precompile.run(precompile.Item(name, "fp32"))
    assert set(launches) == entry_points().keys()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_other_targets(tmp_path, target):
    filled = precompile.fill(target, tmp_path, precompile.items(["SGD", "noise"], ["bf16"]))
    assert filled.kernels and not filled.failed
    made = json.loads(next(tmp_path.glob("*/noise_kernel.json")).read_text())
    assert made["target"]["arch"] == (80 if target == "sm_80" else "gfx942")


def test_what_does_not_compile_is_told(tmp_path, monkeypatch):
    filled = precompile.fill("sm_90", tmp_path, [precompile.Item("AdamW", "fp32", "sideways")])
    assert list(filled.failed) == ["AdamW fp32"] and "sideways" in filled.failed["AdamW fp32"]
    assert not kernel_cache.read(tmp_path)


def test_info_tells_what_is_cached(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert "no kernels ahead of time; `fastreg precompile`" in str(fastreg.info())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    count = kernel_cache.read(cache)[0].kernels
    assert fastreg.info().kernels == (f"{count} kernels for sm_90 in {cache}",)
    monkeypatch.setattr(kernel_cache, "identity", lambda: "another")
    assert "of another version: run fastreg precompile --target sm_90" in str(fastreg.info())
    (tmp_path / kernel_cache.FILE).write_text("{")
    assert kernel_cache.read(tmp_path) == []


@pytest.mark.slow
def test_the_command(tmp_path, capsys, monkeypatch):
    """The folder may be named relative to another one; Triton stores absolute paths."""
    monkeypatch.chdir(tmp_path.parent)
    arguments = ["precompile", "--target", "sm_90", "--target", "sm_100", "--out", tmp_path.name]
    assert main([*arguments, "--only", "SGD,clip+Lion", "--dtype", "fp32", "--jobs", "2"]) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert [line.rpartition("\r")[2].partition(",")[0] for line in lines] == [
        f"{target}: 7 kernels in {tmp_path}" for target in ("sm_90", "sm_100")
    ]
    assert {cached.target for cached in kernel_cache.read(tmp_path)} == {"sm_90", "sm_100"}
    group = json.loads(next(tmp_path.glob("*/__grp__*.json")).read_text())
    assert all(path.startswith(str(tmp_path)) for path in group["child_paths"].values())
    assert main(["precompile", "--list"]) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == list(families.FAMILIES)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "there is no GPU here: name a target, for example --target sm_90"),
        (["--target", "h100"], "--target: a target must be such as sm_90 or gfx942, got 'h100'"),
        (
            ["--target", "sm_90", "--only", "AdamV"],
            "--only: unknown name 'AdamV'; --list shows the names, and parts may be combined",
        ),
        (
            ["--target", "sm_90", "--only", ","],
            "--only names nothing, got ','; for example --only AdamW,dropout",
        ),
        (
            ["--target", "sm_90", "--dtype", "fp8"],
            "--dtype: unknown dtype 'fp8'; choose from fp32, bf16, fp16, mixed",
        ),
        (
            ["--target", "sm_90", "--features", "768,wide"],
            "--features: must be a whole number >= 1, got 'wide'",
        ),
        (["--target", "sm_90", "--dtype", ""], "--dtype names nothing, got ''; for example --dtype fp32"),
        (
            ["--target", "sm_90", "--dtype", "mixed", "--only", "dropout"],
            "there is nothing to compile: none of these names has kernels of these dtypes",
        ),
        (["--target", "sm_90", "--out", ""], "--out names no folder"),
        (["--target", "sm_90", "--out", __file__], "cannot be written (File exists): name another --out"),
        (["--target", "sm_90", "--out", "/proc/1"], "/proc/1 cannot be written ("),
        (["--target", "sm_90", "--jobs", "0"], "must be a whole number >= 1, got '0'"),
    ],
)
def test_wrong_arguments(arguments, expected, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["precompile", *arguments]) == 2
    assert expected in capsys.readouterr().err
