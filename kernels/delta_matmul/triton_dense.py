"""Grouped delta matmul of dense operands in Triton: low-rank factors and listed rows of a head.

T rows of the step, C chunks of rows, S slots, K inputs, N outputs, R rank or listed rows,
X split of K. Routing, tables and the order of sums are as in ``triton.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve.kernels.delta_matmul.triton import add_to_output, chunk_rows, fields_of, operand


@triton.jit
def dense_product(
    w_RK, r_B, real_B, x_TK, row_M, real_M, stride_x, num_in, begin, end, BLOCK_K: tl.constexpr
):
    """Rows ``r`` of w times the chunk's rows of x, over the inputs begin .. end -> [B, M]."""
    sum_BM = tl.zeros((r_B.shape[0], row_M.shape[0]), tl.float32)
    x_rows = x_TK + row_M.to(tl.int64) * stride_x
    w_rows = w_RK + r_B.to(tl.int64) * num_in
    for first in range(begin, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        real_K = k < end
        w_BK = tl.load(
            w_rows[:, None] + k[None, :],
            mask=real_B[:, None] & real_K[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        x_KM = tl.load(
            x_rows[None, :] + k[:, None],
            mask=real_M[None, :] & real_K[:, None],
            other=0.0,
            eviction_policy="evict_last",
        )
        sum_BM = tl.dot(w_BK, x_KM, sum_BM, input_precision="ieee")
    return sum_BM


@triton.jit
def lowrank_shrink(
    partial_XTR,
    x_TK,
    table_SF,
    num_slots,
    slot_C,
    start_C,
    end_C,
    stride_x,
    num_rows,
    num_in,
    width,
    SPLIT: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Partial sums of v @ x, grid (C, blocks of R, SPLIT); ``width`` is the widest rank."""
    chunk = tl.program_id(0)
    fields = fields_of(table_SF, tl.load(slot_C + chunk), num_slots, FIELDS)
    address = tl.load(fields)
    first_r = tl.program_id(1) * BLOCK_R
    if (address == 0) | (first_r >= tl.load(fields + 3)):
        return
    row_M, real_M = chunk_rows(start_C, end_C, chunk, BLOCK_M)
    r_B = first_r + tl.arange(0, BLOCK_R)
    share = tl.cdiv(tl.cdiv(num_in, BLOCK_K), SPLIT) * BLOCK_K
    begin = tl.program_id(2) * share
    h_BM = dense_product(
        operand(address, x_TK.dtype.element_ty),
        r_B,
        r_B >= 0,  # the factors are padded to whole blocks
        x_TK,
        row_M,
        real_M,
        stride_x,
        num_in,
        begin,
        tl.minimum(begin + share, num_in),
        BLOCK_K,
    )
    row_at = (tl.program_id(2) * num_rows + row_M).to(tl.int64) * width
    tl.store(partial_XTR + row_at[None, :] + r_B[:, None], h_BM, mask=real_M[None, :])


@triton.jit
def lowrank_expand(
    y_TN,
    partial_XTR,
    table_SF,
    num_slots,
    scale_S,
    slot_C,
    start_C,
    end_C,
    stride_y,
    num_rows,
    width,
    SPLIT: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y += scale * u @ h, grid (C, blocks of N); h is summed over its partial sums in order.

    Up to three projections of one input lie side by side, each with its own part of h: a tile of
    outputs multiplies by the parts that it touches, mostly one.
    """
    chunk = tl.program_id(0)
    slot = tl.load(slot_C + chunk)
    fields = fields_of(table_SF, slot, num_slots, FIELDS)
    num_out = tl.load(fields + 2).to(tl.int32)
    if tl.program_id(1) * BLOCK_N >= num_out:
        return
    row_M, real_M = chunk_rows(start_C, end_C, chunk, BLOCK_M)
    rank = tl.multiple_of(tl.load(fields + 4).to(tl.int32), 16)
    dtype: tl.constexpr = y_TN.dtype.element_ty
    u_NR = operand(tl.load(fields + 1), dtype)
    first_n = tl.program_id(1) * BLOCK_N
    n_N = first_n + tl.arange(0, BLOCK_N)
    end_0, end_1 = tl.load(fields + 5), tl.load(fields + 6)
    last_n = tl.minimum(first_n + BLOCK_N, num_out) - 1
    first_part = (first_n >= end_0).to(tl.int32) + (first_n >= end_1).to(tl.int32)
    last_part = (last_n >= end_0).to(tl.int32) + (last_n >= end_1).to(tl.int32)
    part_N = (n_N >= end_0).to(tl.int32) + (n_N >= end_1).to(tl.int32)
    real_N = n_N < num_out
    sum_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for part in range(first_part, last_part + 1):
        own_N = real_N & (part_N == part)
        for first in range(0, rank, BLOCK_R):
            r_B = first + tl.arange(0, BLOCK_R)
            u_at = u_NR + n_N[:, None].to(tl.int64) * rank + r_B[None, :]
            u_NB = tl.load(u_at, mask=own_N[:, None], other=0.0)
            h_BM = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
            for split in tl.static_range(SPLIT):
                row_at = (split * num_rows + row_M).to(tl.int64) * width + part * rank
                at = partial_XTR + row_at[None, :] + r_B[:, None]
                h_BM += tl.load(at, mask=real_M[None, :], other=0.0)
            sum_NM = tl.dot(u_NB, h_BM.to(dtype), sum_NM, input_precision="ieee")
    sum_NM *= tl.load(scale_S + slot)
    add_to_output(y_TN, stride_y, row_M, real_M, n_N, real_N, sum_NM)


@triton.jit
def listed_rows(
    y_TN,
    x_TK,
    table_SF,
    num_slots,
    slot_C,
    start_C,
    end_C,
    stride_y,
    stride_x,
    num_in,
    FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Overwrite the listed outputs with values @ x, grid (C, blocks of R)."""
    chunk = tl.program_id(0)
    fields = fields_of(table_SF, tl.load(slot_C + chunk), num_slots, FIELDS)
    num_listed = tl.load(fields + 2).to(tl.int32)
    if tl.program_id(1) * BLOCK_N >= num_listed:
        return
    row_M, real_M = chunk_rows(start_C, end_C, chunk, BLOCK_M)
    r_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real_N = r_N < num_listed
    values = operand(tl.load(fields), x_TK.dtype.element_ty)
    sum_NM = dense_product(
        values, r_N, real_N, x_TK, row_M, real_M, stride_x, num_in, 0, num_in, BLOCK_K
    )
    column_N = tl.load(operand(tl.load(fields + 1), tl.int32) + r_N, mask=real_N, other=0)
    at = y_TN + row_M[None, :].to(tl.int64) * stride_y + column_N[:, None]
    tl.store(at, sum_NM.to(y_TN.dtype.element_ty), mask=real_M[None, :] & real_N[:, None])
