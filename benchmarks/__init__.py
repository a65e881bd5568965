"""Benchmarks and the code audit."""

SUITES = ("rules", "regularizers", "norm", "penalty", "sam", "averages", "dropout", "host", "training")
"""The modules that hold benchmarks, in the order in which they run."""
