"""Paged attention in Triton: prefill chunks and decode rows, one kernel and an ordered merge.

T packed tokens, R sequences, H query heads, G key/value heads, D head size, P programs along the
packed tokens, X spans of the context. A *slot* is one token's place in the cache.

A program takes a few neighbouring queries of one sequence and all query heads that share a
key head: keys are read once for the whole group. Decode rows cut their context into spans of
fixed length, so that one long sequence still fills the GPU; the spans' results are merged in
order. Neither cuts nor order depend on the batch, so a row's result does not either.

The online softmax is that of FlashAttention-2 (Dao, 2023); splitting the context is Flash-Decoding.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def scatter_kv(
    k_cache,
    v_cache,
    k_TGD,
    v_TGD,
    slot_T,
    stride_cache,
    stride_k_T,
    stride_k_G,
    stride_v_T,
    stride_v_G,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (T, G): one new token's key and value of one head. A negative slot is padding."""
    token, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slot_T + token).to(tl.int64)
    if slot < 0:
        return
    d = tl.arange(0, BLOCK_D)
    real_D = d < HEAD_DIM
    k = tl.load(k_TGD + token * stride_k_T + head * stride_k_G + d, mask=real_D)
    v = tl.load(v_TGD + token * stride_v_T + head * stride_v_G + d, mask=real_D)
    at = slot * stride_cache + head * HEAD_DIM + d
    tl.store(k_cache + at, k, mask=real_D)
    tl.store(v_cache + at, v, mask=real_D)


@triton.jit
def slots_of(table, position_L, real_L, BLOCK_SIZE: tl.constexpr):
    """Where the tokens at these positions of a sequence lie in the cache."""
    block_L = tl.load(table + position_L // BLOCK_SIZE, mask=real_L, other=0).to(tl.int64)
    return block_L * BLOCK_SIZE + position_L % BLOCK_SIZE


@triton.jit
def capped(score, softcap):
    """softcap * tanh(score / softcap), by exponentials of negative numbers: none overflows."""
    e = tl.exp2(tl.abs(score) * (-2 * LOG2_E) / softcap)
    bounded = softcap * (1 - e) / (1 + e)
    return tl.where(score < 0, -bounded, bounded)


@triton.jit
def attend(
    out_THD,
    partial_XTHD,
    weight_XTH,
    q_THD,
    k_cache,
    v_cache,
    row_P,
    first_P,
    start_R,
    len_R,
    table_RB,
    num_tokens,
    num_heads,
    stride_q_T,
    stride_q_H,
    stride_cache,
    stride_table,
    scale,
    softcap,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (P, G, X): queries from ``first_P`` on of sequence ``row_P``, one span of its context.

    Row m of a tile is query m // GROUP and head m % GROUP. WINDOW 0: none. SPLIT: write the
    span's own result and its weight (log2 of the sum of its exponentials), else the output.
    """
    row = tl.load(row_P + tl.program_id(0))
    if row < 0:
        return
    kv_head, span = tl.program_id(1), tl.program_id(2)
    end = tl.load(start_R + row + 1)
    context = tl.load(len_R + row)
    m = tl.arange(0, BLOCK_M)
    first_token = tl.load(first_P + tl.program_id(0))
    token_M = first_token + m // GROUP
    head_M = kv_head * GROUP + m % GROUP
    real_M = (token_M < end) & (m < BLOCK_M // GROUP * GROUP)
    position_M = context - end + token_M
    # Positions that the first and the last query of the tile see.
    low, high = 0, context - end + tl.minimum(first_token + BLOCK_M // GROUP, end)
    if WINDOW > 0:
        low = tl.maximum(context - end + first_token - WINDOW + 1, 0) // BLOCK_L * BLOCK_L
    if SPLIT:
        low = tl.maximum(low, span * SPAN)
        high = tl.minimum(high, (span + 1) * SPAN)
    if low >= high:  # a span past the context, or before the window
        return
    d = tl.arange(0, BLOCK_D)
    real_D = d < HEAD_DIM
    q_at = q_THD + token_M.to(tl.int64) * stride_q_T + head_M * stride_q_H
    q_MD = tl.load(q_at[:, None] + d[None, :], mask=real_M[:, None] & real_D[None, :], other=0.0)
    table = table_RB + row.to(tl.int64) * stride_table
    peak_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_M = tl.zeros((BLOCK_M,), tl.float32)
    sum_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(low, high, BLOCK_L):
        position_L = first + tl.arange(0, BLOCK_L)
        real_L = position_L < high
        slot_L = slots_of(table, position_L, real_L, BLOCK_SIZE)
        at_L = slot_L * stride_cache + kv_head * HEAD_DIM
        mask_LD = real_L[:, None] & real_D[None, :]
        k_LD = tl.load(k_cache + at_L[:, None] + d[None, :], mask=mask_LD, other=0.0)
        score_ML = tl.dot(q_MD, tl.trans(k_LD), input_precision="ieee") * scale
        if SOFTCAP:
            score_ML = capped(score_ML, softcap)
        seen = real_L[None, :] & (position_L[None, :] <= position_M[:, None])
        if WINDOW > 0:
            seen &= position_L[None, :] > position_M[:, None] - WINDOW
        score_ML = tl.where(seen, score_ML * LOG2_E, float("-inf"))
        new_peak_M = tl.maximum(peak_M, tl.max(score_ML, 1))
        # A row that has seen nothing yet must not subtract infinity from itself.
        safe_M = tl.where(new_peak_M == float("-inf"), 0.0, new_peak_M)
        keep_M = tl.exp2(peak_M - safe_M)
        prob_ML = tl.exp2(score_ML - safe_M[:, None])
        total_M = total_M * keep_M + tl.sum(prob_ML, 1)
        v_LD = tl.load(v_cache + at_L[:, None] + d[None, :], mask=mask_LD, other=0.0)
        sum_MD = sum_MD * keep_M[:, None]
        sum_MD = tl.dot(prob_ML.to(v_LD.dtype), v_LD, sum_MD, input_precision="ieee")
        peak_M = new_peak_M

    nothing_M = total_M == 0
    result_MD = sum_MD / tl.where(nothing_M, 1.0, total_M)[:, None]
    mask_MD = real_M[:, None] & real_D[None, :]
    flat_M = token_M.to(tl.int64) * num_heads + head_M
    if SPLIT:
        flat_M += span.to(tl.int64) * num_tokens * num_heads
        tl.store(partial_XTHD + flat_M[:, None] * HEAD_DIM + d[None, :], result_MD, mask=mask_MD)
        weight_M = tl.where(nothing_M, float("-inf"), peak_M + tl.log2(total_M))
        tl.store(weight_XTH + flat_M, weight_M, mask=real_M)
    else:
        at = out_THD + flat_M[:, None] * HEAD_DIM + d[None, :]
        tl.store(at, result_MD.to(out_THD.dtype.element_ty), mask=mask_MD)


@triton.jit
def merge_spans(
    out_THD,
    partial_XTHD,
    weight_XTH,
    row_P,
    first_P,
    len_R,
    num_tokens,
    num_heads,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (P, H): the spans of one query and head, in order, weighted as one softmax would."""
    row = tl.load(row_P + tl.program_id(0))
    if row < 0:
        return
    token, head = tl.load(first_P + tl.program_id(0)), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    real_D = d < HEAD_DIM
    peak, total = float("-inf"), 0.0
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    context = tl.load(len_R + row)
    first = 0
    if WINDOW > 0:  # spans before it have written nothing
        first = tl.maximum(context - WINDOW, 0) // SPAN
    for span in range(first, tl.cdiv(context, SPAN)):
        flat = (span * num_tokens + token).to(tl.int64) * num_heads + head
        weight = tl.load(weight_XTH + flat)
        part_D = tl.load(partial_XTHD + flat * HEAD_DIM + d, mask=real_D, other=0.0)
        new_peak = tl.maximum(peak, weight)
        keep, share = tl.exp2(peak - new_peak), tl.exp2(weight - new_peak)
        sum_D = sum_D * keep + part_D * share
        total = total * keep + share
        peak = new_peak
    flat = token.to(tl.int64) * num_heads + head
    at = out_THD + flat * HEAD_DIM + d
    tl.store(at, (sum_D / total).to(out_THD.dtype.element_ty), mask=real_D)
