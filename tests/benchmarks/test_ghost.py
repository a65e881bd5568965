"""How sums over positions are taken: wide loads, no local memory, products as precise as their factors."""

import pytest

from fastreg_benchmarks import audit, kernels, sass

ENTRIES = {entry.name: entry for entry in kernels.ghost_entries()}


@pytest.mark.parametrize("target", audit.TARGETS)
@pytest.mark.parametrize("name", ENTRIES)
def test_holds_everywhere(name, target):
    assert audit.audit(ENTRIES[name], target).faults == []


@pytest.mark.parametrize("name", ENTRIES)
def test_code(name):
    code = sass.read(audit.compile_entry(ENTRIES[name], "sm_80").asm["cubin"]).instructions
    names = {instruction.name for instruction in code}
    assert {"LDG.E.128", "LDGSTS.E.BYPASS.128"} & names
    assert not any(name.startswith(("ATOM", "RED")) for name in names)
    products = {name for name in names if name.startswith(("HMMA", "HGMMA", "IMMA"))}
    # TF32 keeps 10 bits of a factor: all of those with 16 bits, and none of float32 are multiplied so.
    assert products == ({"HMMA.1688.F32.TF32"} if name == "ghost sums bf16" else set())
