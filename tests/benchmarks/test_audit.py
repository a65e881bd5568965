"""The code audit holds every kernel to its documented cost, and notices what it must notice."""

import importlib
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import fastreg.nn
from fastreg.engine.stage import Chain, Stage
from fastreg.runtime import launch_parameters
from fastreg_benchmarks import audit, chains, kernels, operators, sass
from fastreg_benchmarks.entry_points import entry_points

ENTRIES = kernels.entries(audit.TARGETS["sm_90"].warp_size)
OTHER_TARGETS = [target for target in audit.TARGETS if target != "sm_90"]


@pytest.mark.parametrize(
    "entry",
    # Of mixed storage, weights are those of bf16 and state is that of fp32.
    [pytest.param(e, id=e.name, marks=[pytest.mark.slow] * e.name.endswith(" mixed")) for e in ENTRIES],
)
def test_holds_on_sm_90(entry):
    assert audit.audit(entry, "sm_90").faults == []


@pytest.mark.parametrize("target", OTHER_TARGETS)
@pytest.mark.parametrize("name", ["AdamW bf16", "clip+noise+AdamW+EMA fp32", "SAM climb bf16"])
def test_holds_elsewhere(name, target):
    entry = next(
        entry for entry in kernels.entries(audit.TARGETS[target].warp_size, target) if entry.name == name
    )
    assert audit.audit(entry, target).faults == []


def test_a_name_of_no_kernel_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        audit.main(["sm_90", "--only", "nosuch"])
    assert "no kernel begins with 'nosuch'; there are AdamW, " in capsys.readouterr().err


def test_every_entry_point_is_audited():
    """Every `@triton.jit` function that is launched, by the convention of its name and by being called so."""
    points = entry_points()
    assert points and points.keys() == {entry.kernel.__name__ for entry in ENTRIES}


def test_what_is_launched_is_named_as_an_entry_point():
    """By `kernels.name`, or as an elementwise operator: no kernel escapes the audit by another name."""
    source = "".join(file.read_text() for file in Path(fastreg.__file__).parent.rglob("*.py"))
    launched = set(re.findall(r"\bkernels\.(\w+_kernel)\b", source))
    launched |= set(re.findall(r"launch\w*\(\s*kernels\.(\w+)", source))
    launched |= {f"{name}_kernel" for name in re.findall(r'Elementwise\(\s*"(\w+)"', source)}
    assert launched == entry_points().keys()
    assert re.findall(r"\w+\[\(?\w+,?\)?\]\(\*arguments", source) == ["kernel[(programs,)](*arguments"]


def test_every_kernel_has_launch_parameters():
    assert {f"{name}_kernel" for name in launch_parameters.DEFAULTS} == entry_points().keys()
    for measured in launch_parameters.MEASURED.values():
        assert measured.keys() <= launch_parameters.DEFAULTS.keys()


def test_single_programs_hide_their_own_latency():
    """Where one program reads all partial results, its threads have many loads under way."""
    entry = next(entry for entry in ENTRIES if entry.name == "clip factor")
    report = audit.audit(entry, "sm_90")
    assert report.in_flight >= kernels.IN_FLIGHT and report.faults == []
    narrow = replace(entry, constants={**entry.constants, "BLOCK": 1024})
    assert any("in flight" in fault for fault in audit.audit(narrow, "sm_90").faults)


FEWER_IN_FLIGHT = {"norm fp32": 7} if triton.__version__.startswith("3.6.") else {}
"""What Triton 3.6 makes of it; later versions leave 11 loads under way."""


@pytest.mark.parametrize("name", ["AdamW fp32", "AdamW bf16", "norm fp32"])
def test_misaligned_tensors_keep_loads_in_flight(name):
    """A gradient in a bucket may start anywhere: its tensor's loop is narrow, but not one load at a time."""
    loads = FEWER_IN_FLIGHT.get(name, 8)
    entry = next(entry for entry in ENTRIES if entry.name == name)
    code = sass.read(audit.compile_entry(entry, "sm_90").asm["cubin"]).instructions
    narrow = [loop for loop in sass.loops(code) if any(i.kind == "LDG" for i in loop) and not sass.wide(loop)]
    assert narrow and max(map(sass.loads_in_flight, narrow)) >= loads


DOCUMENTED = {
    "AdamW fp32": 28, "clip+AdamW+EMA fp32": 36, "SGD-momentum fp32": 20, "AdamW bf16": 14,
    "AdamW+Lookahead fp32": 36, "Lookahead sync fp32": 16, "AdamW+SWA fp32": 36,
    "AveragedModel fp32": 12, "AveragedModel bf16": 12,
    "MSAM+SGD-momentum fp32": 20, "MSAM+AdamW fp32": 28, "SAM+SGD-momentum fp32": 20, "SAM+AdamW fp32": 28,
    "SAM climb fp32": 16, "ASAM climb fp32": 16, "SAM restore fp32": 8,
    "weight noise fp32": 12, "dp+AdamW fp32": 28, "dp+AdamW bf16": 16, "dp+SGD-momentum fp32": 20,
}  # fmt: skip
NORMS = {
    "momentum norm, AdamW fp32": 8, "momentum norm, AdamW mixed": 6, "momentum norm, SGD-momentum fp32": 8,
    "momentum norm, SGD-momentum-decay fp32": 12,
    "adaptive norm fp32": 8, "norm fp32": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_bytes(name):
    assert next(entry for entry in ENTRIES if entry.name == name).bytes == DOCUMENTED[name]
    assert next(c for c in chains.shipped() if f"{c.name} {c.storage}" == name).bytes == DOCUMENTED[name]


def test_dropout():
    """bf16: 4 bytes and 15 instructions an element, nothing through shared memory; 41 with what is fused."""
    plain = audit.audit(next(entry for entry in ENTRIES if entry.name == "dropout bf16"), "sm_90")
    assert (plain.entry.bytes, plain.shared, plain.loads, plain.stores) == (4, 0, [128], [128])
    assert plain.instructions <= 15
    assert max(map(max, operators.DROPOUT.values())) <= 41


def test_adversarial():
    """A step along the gradient moves what it must: an element is read and written once."""
    bytes_moved = {"FGSM": (12, 6), "PGD": (16, 14), "PGD, L2": (16, 14), "random start": (8, 8)}
    for name, (fp32, bf16) in bytes_moved.items():
        sizes = {entry.name: entry.bytes for entry in ENTRIES}
        assert (sizes[f"{name} fp32"], sizes[f"{name} bf16"]) == (fp32, bf16)
    plain = audit.audit(next(entry for entry in ENTRIES if entry.name == "PGD fp32"), "sm_90")
    assert (plain.shared, plain.loads, plain.stores) == (0, [128], [128]) and plain.instructions <= 17


@pytest.mark.parametrize("name", NORMS)
def test_documented_bytes_of_norms(name):
    (entry,) = (entry for entry in ENTRIES if entry.name == name)
    assert (entry.reads, entry.writes) == (NORMS[name], 0)


@pytest.mark.parametrize("dtype, storage", [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda ps: chains.optimizer("SAM+AdamW", ps), ["SAM climb", "SAM+AdamW"]),
        (lambda ps: fastreg.SAM(ps, torch.optim.SGD, adaptive=True), ["ASAM climb", "SAM restore"]),
        (lambda ps: chains.optimizer("MSAM+SGD-momentum", ps), ["MSAM+SGD-momentum"]),
        (lambda ps: chains.optimizer("MSAM+SGD-momentum-decay", ps), ["MSAM+SGD-momentum-decay"]),
        (lambda ps: fastreg.Lookahead(torch.optim.SGD(ps), k=1), ["Lookahead sync"]),
        (lambda ps: fastreg.Lookahead(fastreg.AdamW(ps), k=1), ["AdamW+Lookahead"]),
        (lambda ps: averaged(ps), ["AveragedModel"]),
        (lambda ps: noisy(ps), ["weight noise", "SAM restore"]),
        (lambda ps: private(ps), ["dp+AdamW"]),
    ],
)
def test_what_is_audited_is_what_runs(make, expected, dtype, storage, monkeypatch):
    """Chains and dtypes of the table are those of the batches that the library makes."""
    launched = []
    monkeypatch.setattr(
        fastreg.engine.launch, "run", lambda batch: launched.append((batch.chain, batch.dtypes))
    )
    parameter = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    with fastreg.use_backend("reference"):
        chains.whole_step(make([parameter]))()
    rows = {c.name: (c.chain, c.dtypes) for c in chains.shipped() if c.storage == storage}
    assert launched == [rows[name] for name in expected]


def averaged(params):
    """Something whose `step` updates the averages of a model."""
    model = torch.nn.ParameterList(params)
    made = fastreg.AveragedModel(model)
    return SimpleNamespace(step=lambda: made.update_parameters(model))


def noisy(params):
    """Something whose `step` perturbs weights and brings them back."""
    made = fastreg.WeightNoise(params, 0.01)

    def step():
        made.perturb()
        made.restore()

    return SimpleNamespace(step=step)


def private(params):
    """A private step on the gradients of two samples."""
    for p in params:
        p.grad_sample = torch.ones(2, *p.shape, dtype=p.dtype)
    return fastreg.DPOptimizer(fastreg.AdamW(params), expected_batch_size=2)


@pytest.mark.parametrize(
    "name, exact", [("dp+AdamW fp32", True), ("noised norm fp32", True), ("AdamW fp32", False)]
)
def test_privacy_noise_is_not_fused(name, exact):
    """Fused multiply-adds would round it otherwise than the reference does."""
    (entry,) = (entry for entry in ENTRIES if entry.name == name)
    assert ("fma.rn.f32" in audit.compile_entry(entry, "sm_90").asm["ptx"]) != exact


# What the audit must notice: stages and kernels with a fault each.


@triton.jit
def halved(p, u, at):
    return p - u * 0.5, u, ()


@triton.jit
def scalar_arithmetic(p, u, at, beta, lr):
    return p - u * (1 - beta) * lr, u, ()


@triton.jit
def narrow_copy(x, y, n, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    for start in range(0, n, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        tl.store(y + offsets, tl.load(x + offsets, mask=offsets < n), mask=offsets < n)


@triton.jit
def spilling(x, y, n, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Keeps 128 KB of one program's values until their sum is known: 256 values a thread in 255 registers."""
    offsets = tl.arange(0, 32 * BLOCK)
    for start in range(0, n // 16 * 16, 32 * BLOCK):
        a = tl.load(tl.multiple_of(x, 16) + start + offsets)
        tl.store(tl.multiple_of(y, 16) + start + offsets, a - tl.sum(a))


def chain_of(kernel, step_scalars=0):
    """A chain of one stage, for compilation only."""
    return Chain((Stage(kernel, lambda *_: None, step_scalars=step_scalars),))


def test_notices_scalar_arithmetic_in_a_stage():
    entry = kernels.step_entry("toy", chain_of(scalar_arithmetic, step_scalars=2), (torch.float32,) * 2)
    assert any("scalars" in fault for fault in audit.audit(entry, "sm_90").faults)
    clean = kernels.step_entry("toy", chain_of(halved), (torch.float32,) * 2)
    assert audit.audit(clean, "sm_90").faults == []


def _copy_entry(kernel, block=1024):
    constants = {"BLOCK": block, "CHUNK": 1024}
    return kernels.Entry("toy", kernel, {"x": "*fp32", "y": "*fp32", "n": "i32"}, constants, 4, 4)


def test_notices_a_scalar_load_kernel():
    report = audit.audit(_copy_entry(narrow_copy), "sm_90")
    assert any("128" in fault for fault in report.faults), report


def test_notices_local_memory():
    report = audit.audit(_copy_entry(spilling), "sm_90")
    assert any("spills" in fault or "local memory" in fault for fault in report.faults), report


def test_notices_a_budget_exceeded():
    entry = next(entry for entry in ENTRIES if entry.name == "AdamW fp32")
    report = audit.audit(entry, "sm_90")
    report.entry = kernels.Entry(**{**vars(entry), "budget": report.instructions - 0.1})
    assert any("instructions" in fault for fault in report.faults)


def test_notices_wrong_bytes():
    entry = next(entry for entry in ENTRIES if entry.name == "AdamW fp32")
    entry = kernels.Entry(**{**vars(entry), "reads": entry.reads + 4})
    assert any("documented" in fault for fault in audit.audit(entry, "sm_90").faults)


def _key(entry):
    """What Triton's disk cache knows a compilation by."""
    signature, constants, attributes = audit.signature(entry)
    return ASTSource(entry.kernel, signature, constants, attributes).hash()


def test_editing_a_stage_changes_the_compile_key(tmp_path):
    """As `tl.constexpr`, the tuple of stages would be known by names alone and stale code would run."""
    source = "import triton\n\n\n@triton.jit\ndef stage(p, u, at):\n    return p, u * {}, ()\n"
    keys = []
    for factor in ("2.0", "5.0", "2.0"):
        path = tmp_path / f"stage_{len(keys)}.py"
        path.write_text(source.format(factor))
        spec = importlib.util.spec_from_file_location("edited_stage", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        keys.append(_key(kernels.step_entry("toy", chain_of(module.stage), (torch.float32,) * 2)))
    assert keys[0] != keys[1] and keys[0] == keys[2]


def test_runs_without_the_interpreter():
    assert os.environ.get("TRITON_INTERPRET") != "1" and isinstance(ENTRIES[0].kernel, JITFunction)
