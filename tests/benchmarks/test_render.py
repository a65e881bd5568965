"""What the READMEs tell is what the committed JSON files hold."""

import json

import pytest

from fastreg_benchmarks import render, report


def test_the_readmes_are_up_to_date():
    stale = [path.name for path, text in render.rendered().items() if path.read_text("utf-8") != text]
    assert not stale, "run `make render`"


def test_the_recorded_audit_has_no_faults():
    """On any target: tests compile a few kernels for those besides sm_90."""
    rows = render.audited()["rows"]
    assert {row["target"] for row in rows} >= {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert not [(row["kernel"], row["target"], row["faults"]) for row in rows if row["faults"]]


def test_without_a_gpu_it_says_so():
    gpus = [name for name, run in render.runs().items() if "multiprocessors" in run["machine"]]
    assert ("No GPU has run these kernels yet" in render.performance()) == (not gpus)


@pytest.fixture
def with_gpu(tmp_path, monkeypatch):
    """The committed results, and a run that says it comes from a GPU."""
    (tmp_path / "audit.json").write_text((render.RESULTS / "audit.json").read_text("utf-8"), "utf-8")
    source = next(iter(render.RESULTS.glob("*/bench.json")))
    run = json.loads(source.read_text("utf-8"))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "bench.json").write_text(json.dumps(run))
    run["machine"] |= {"device": "NVIDIA H200", "multiprocessors": 132, "wheel_cuda": "13.0"}
    run["results"] = run["results"][:1]
    run["results"][0]["rows"]["fastreg"]["ms"] = {"median": 0.1234, "q20": 0.12, "q80": 0.13}
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "bench.json").write_text(json.dumps(run))
    monkeypatch.setattr(render, "RESULTS", tmp_path)


def test_a_gpu_comes_first(with_gpu):
    assert list(render.runs()) == ["h200", "cpu"]
    text = render.performance()
    assert text.startswith("NVIDIA H200, torch for CUDA 13.0") and "123 µs" in text
    assert "No GPU" not in text
    gpu, cpu = (f"## {report.machine_line(run)}" for run in render.runs().values())
    assert render.everything().index(gpu) < render.everything().index(cpu)


def test_a_figure_that_changes_shows(with_gpu):
    path = render.RESULTS / "cpu" / "bench.json"
    before = render.performance()
    path.write_text(
        path.read_text().replace(
            str(json.loads(path.read_text())["results"][0]["rows"]["fastreg"]["ratio"]["median"]), "7.77"
        )
    )
    assert "7.77" in render.performance() and "7.77" not in before


def test_steps_of_several_passes_are_told_as_one(tmp_path, monkeypatch):
    """SAM's with its norm and its climb; MSAM's with the norm of the momentum; passes have no row."""
    listed = {
        "norm fp32": (4, 4.5), "AdamW fp32": (28, 29), "SAM climb fp32": (16, 11), "SAM+AdamW fp32": (28, 29),
        "momentum norm, AdamW fp32": (8, 9), "MSAM+AdamW fp32": (28, 31), "AdamW+Lookahead fp32": (36, 33),
    }  # fmt: skip
    rows = [
        {"kernel": name, "target": "sm_90", "bytes": moved, "instructions": instructions, "registers": 40}
        for name, (moved, instructions) in listed.items()
    ]
    (tmp_path / "audit.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    text = render._machine_code()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
    assert lines == [
        ["AdamW", "28", "29", "40", "28"],
        ["SAM+AdamW", "48", "44", "40", "76"],
        ["MSAM+AdamW", "36", "40", "40"],
        ["AdamW+Lookahead", "36", "33", "40", "48"],
    ]
    assert "davda54" in text
