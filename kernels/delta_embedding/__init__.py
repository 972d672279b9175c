"""Embedding rows of a fine-tune."""

from deltaserve.kernels.delta_embedding.grouped import GroupedEmbeddings
from deltaserve.kernels.delta_embedding.reference import delta_embedding, rows_of

__all__ = ["GroupedEmbeddings", "delta_embedding", "rows_of"]
