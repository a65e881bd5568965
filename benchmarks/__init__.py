"""Benchmarks of fastreg and the audit of its machine code."""

SUITES = (
    "rules", "regularizers", "norm", "penalty", "sam", "averages", "dropout", "noise", "adversarial",
    "host", "privacy", "training",
)  # fmt: skip
"""The modules that hold benchmarks, in the order in which they run."""
