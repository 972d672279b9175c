"""Grids of the embedding kernels. T tokens, D columns."""

from __future__ import annotations

import torch
import triton

from deltaserve.kernels.delta_embedding import triton as kernels
from deltaserve.kernels.delta_matmul.grouped import Table
from deltaserve.kernels.delta_matmul.layout import FIELDS, Kind

BLOCK_D = 1024


def embed(
    kind: Kind,
    table: Table,
    out_TD: torch.Tensor,
    ids_T: torch.Tensor,
    slot_T: torch.Tensor,
    scale: float,
) -> None:
    """Turn the base's embeddings into those of each token's delta, in place.

    scale: what the model multiplies embeddings by; that of the base is in ``out_TD`` already.
    """
    num_tokens, num_in = out_TD.shape
    inputs = (out_TD, ids_T, slot_T, *table.slots, out_TD.stride(0), num_in, scale)
    if kind.codec == "rows":
        grid = (num_tokens, triton.cdiv(num_in, BLOCK_D))
        kernels.embed_listed[grid](*inputs, FIELDS=FIELDS, BLOCK_D=BLOCK_D, num_warps=4)
        return
    kernels.embed_packed[(num_tokens, triton.cdiv(num_in, 8 * kind.lanes))](
        *inputs,
        BITS=kind.bits,
        LANES=kind.lanes,
        INDEXED=kind.indexed,
        FIELDS=FIELDS,
        num_warps=1,
    )
