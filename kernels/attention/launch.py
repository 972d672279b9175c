"""Grids and tile sizes of the attention kernels. T tokens, R sequences, H and G heads, D head size,
P programs along the tokens, X spans of the context."""

from __future__ import annotations

import torch
import triton

from deltaserve.kernels.attention import triton as kernels
from deltaserve.kernels.attention.batch import PagedBatch, QueryBlocks

# Rows of a tile: queries times the heads of a group.
DECODE_ROWS = 16
PREFILL_ROWS = 64
STAGES = 2
# The tensor cores' smallest inner dimension.
MIN_DIM = 16


def tile_of(rows: int, head_dim: int) -> tuple[int, int]:
    """(keys per step, warps). Many rows of wide heads need more warps to stay in registers."""
    return (32, 8) if rows > DECODE_ROWS and head_dim > 128 else (64, 4)


def write_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    slot_mapping_T: torch.Tensor,
) -> None:
    """Store the new tokens' keys and values; see ``reference``. Negative slots are skipped."""
    num_tokens, num_heads, head_dim = k_TGD.shape
    kernels.scatter_kv[(num_tokens, num_heads)](
        k_cache,
        v_cache,
        k_TGD,
        v_TGD,
        slot_mapping_T,
        k_cache.stride(0),
        *k_TGD.stride()[:2],
        *v_TGD.stride()[:2],
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=1,
    )


def paged_attention(
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention of every packed token over its own sequence; see ``reference``."""
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    group = q_THD.shape[1] // k_cache.shape[1]
    decode_rows = max(DECODE_ROWS, triton.next_power_of_2(group))
    prefill_rows = max(PREFILL_ROWS, triton.next_power_of_2(group))
    decode, prefill = batch.decode_blocks, batch.prefill_blocks(prefill_rows // group)
    for blocks, rows, spans in (
        (decode, decode_rows, triton.cdiv(decode.longest, batch.span) if decode else 0),
        (prefill, prefill_rows, 1),
    ):
        if blocks is not None:
            _attend(
                out_THD,
                q_THD,
                k_cache,
                v_cache,
                batch,
                blocks,
                rows=rows,
                spans=spans,
                scale=scale,
                window=window or 0,
                softcap=softcap or 0.0,
            )
    return out_THD


def _attend(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: PagedBatch,
    blocks: QueryBlocks,
    *,
    rows: int,
    spans: int,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads = k_cache.shape[1]
    partial, weight = out_THD, out_THD
    if spans > 1:
        partial = q_THD.new_empty(spans, num_tokens, num_heads, head_dim, dtype=torch.float32)
        weight = q_THD.new_empty(spans, num_tokens, num_heads, dtype=torch.float32)
    block_l, warps = tile_of(rows, head_dim)
    block_dim = max(MIN_DIM, triton.next_power_of_2(head_dim))
    kernels.attend[(len(blocks.row_P), num_kv_heads, spans)](
        out_THD,
        partial,
        weight,
        q_THD,
        k_cache,
        v_cache,
        blocks.row_P,
        blocks.first_P,
        batch.start_R,
        batch.len_R,
        batch.block_table_RB,
        num_tokens,
        num_heads,
        *q_THD.stride()[:2],
        k_cache.stride(0),
        batch.block_table_RB.stride(0),
        scale,
        softcap,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=batch.block_size,
        WINDOW=window,
        SOFTCAP=softcap > 0,
        SPLIT=spans > 1,
        SPAN=batch.span,
        BLOCK_M=rows,
        BLOCK_L=block_l,
        BLOCK_D=block_dim,
        num_warps=warps,
        num_stages=STAGES,
    )
    if spans > 1:
        _merge(out_THD, partial, weight, batch, blocks, window, block_dim)


def _merge(
    out_THD: torch.Tensor,
    partial_XTHD: torch.Tensor,
    weight_XTH: torch.Tensor,
    batch: PagedBatch,
    blocks: QueryBlocks,
    window: int,
    block_dim: int,
) -> None:
    num_tokens, num_heads, head_dim = out_THD.shape
    kernels.merge_spans[(len(blocks.row_P), num_heads)](
        out_THD,
        partial_XTHD,
        weight_XTH,
        blocks.row_P,
        blocks.first_P,
        batch.len_R,
        num_tokens,
        num_heads,
        HEAD_DIM=head_dim,
        WINDOW=window,
        SPAN=batch.span,
        BLOCK_D=block_dim,
        num_warps=1,
    )
