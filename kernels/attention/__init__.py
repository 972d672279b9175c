"""Attention over a paged KV cache, prefill chunks and decode rows in one packed batch."""

from deltaserve.kernels.attention.batch import PagedBatch
from deltaserve.kernels.attention.dispatch import paged_attention, write_kv
from deltaserve.kernels.attention.tiles import TokenTile

__all__ = ["PagedBatch", "TokenTile", "paged_attention", "write_kv"]
