"""Runs an optimizer step: components, the plan of a step, the launch of its kernels (see README.md)."""
