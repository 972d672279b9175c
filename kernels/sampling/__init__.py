"""Picking the next token."""

from deltaserve.kernels.sampling.batched import Draw, sample
from deltaserve.kernels.sampling.reference import counter_uniform

__all__ = ["Draw", "counter_uniform", "sample"]
