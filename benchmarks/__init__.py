"""Benchmarks and the code audit."""

SUITES = (
    "rules", "regularizers", "norm", "penalty", "sam", "averages", "dropout", "noise", "adversarial",
    "host", "training",
)  # fmt: skip
"""The modules that hold benchmarks, in the order in which they run."""
