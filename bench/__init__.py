"""Measurements. Each module runs as ``python -m deltaserve.bench.NAME`` and says what it did."""
