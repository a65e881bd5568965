"""Machine code of sums over positions: wide loads, no local memory, 64-bit offsets, exact products."""

import re

import pytest

from fastreg.runtime.device import H200
from fastreg_benchmarks import audit, kernels, sass

ENTRIES = {entry.name: entry for entry in kernels.ghost_entries(H200)}
TARGETS = [
    pytest.param(target, marks=[pytest.mark.slow] * (target not in ("sm_90", "gfx942")))
    for target in audit.TARGETS
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ENTRIES)
def test_holds_everywhere(name, target):
    assert audit.audit(ENTRIES[name], target).faults == []


@pytest.mark.parametrize("name", ENTRIES)
def test_code(name):
    code = sass.read(audit.compile_entry(ENTRIES[name], "sm_80").asm["cubin"]).instructions
    names = {instruction.name for instruction in code}
    assert any(name.startswith("LDG") and name.endswith(".128") for name in names)
    assert not any(name.startswith(("ATOM", "RED")) for name in names)
    products = {name for name in names if name.startswith(("HMMA", "HGMMA", "IMMA"))}
    # Factors of 16 bits are multiplied as they are, at twice the rate of TF32; those of float32 as such.
    assert products == ({"HMMA.16816.F32.BF16"} if name == "ghost sums bf16" else set())


@pytest.mark.parametrize("name", ENTRIES)
def test_offsets_have_64_bits(name):
    """8400 positions of 256 000 logits are more elements than 32 bits count."""
    code = audit.compile_entry(ENTRIES[name], "sm_90").asm["ttir"]
    tiles = re.findall(r"tt\.addptr %(?:left|right)[^:]*: !tt\.ptr<\w+>, (i\d+)", code)
    rows = re.findall(r"arith\.muli [^:]*: tensor<\d+x1x(i\d+)>", code)
    assert set(tiles or rows) == {"i64"}
