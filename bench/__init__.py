"""Measurements. Each module runs as ``python -m deltaserve.bench.NAME`` and says what it did."""

from deltaserve.openmp import spin_briefly

spin_briefly()  # as the command does, before any of these modules loads torch
