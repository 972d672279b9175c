"""Picking the next token."""

from deltaserve.kernels.sampling.reference import counter_uniform, sample

__all__ = ["counter_uniform", "sample"]
