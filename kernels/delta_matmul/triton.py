"""Grouped delta matmul of the packed codecs in Triton: one launch serves every delta of a kind.

T rows of the step, C chunks of rows, S slots, K inputs, N outputs, L lanes, X split of K.
A program takes BLOCK_N outputs of one chunk. What a chunk's slot points to stands in an address
table [S, fields]; a zero address means that the slot has no operand here, and the program is over.

The product is computed transposed, weights first: they then enter the tensor cores straight
from registers, and a chunk of 1 to 16 rows is the narrow side. Sums run over K in one fixed
order, split K into partial sums that ``add_partials`` adds in order: a row's result does not
depend on its neighbours. The reference is ``reference.py``, the layouts are in ``layout.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_rows(start_C, end_C, chunk, BLOCK_M: tl.constexpr):
    """Rows of the step [M] of a chunk, and which of them are real."""
    row_M = tl.load(start_C + chunk) + tl.arange(0, BLOCK_M)
    return row_M, row_M < tl.load(end_C + chunk)


@triton.jit
def fields_of(table_SF, slot, num_slots, FIELDS: tl.constexpr):
    """What a slot points to. Past the end of a table, which only grows for operands of its own
    kind, a slot has nothing there, as the base has not: its row is all zeros."""
    return table_SF + tl.where(slot < num_slots, slot, 0) * FIELDS


@triton.jit
def operand(address, dtype: tl.constexpr):
    """A pointer from the table. Allocations are aligned, and the compiler must know it: else
    loads are not vectorised."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def packed_words(address, BITS: tl.constexpr):
    """An operand of words, each the codes of eight inputs."""
    if BITS == 1:
        words = operand(address, tl.uint8)
    elif BITS == 2:
        words = operand(address, tl.int16)
    else:
        words = operand(address, tl.int32)
    return words


@triton.jit
def levels(words, shift, BITS: tl.constexpr, dtype: tl.constexpr):
    """Codes -> 2 * code - top, odd integers that every dtype holds exactly.

    Converting integers costs a quarter of the rate of plain arithmetic. A code written into the
    mantissa of 128 (1024 in fp16) is that number plus the code; one subtraction remains.
    """
    TOP: tl.constexpr = (1 << BITS) - 1
    codes = (words >> shift) & TOP
    if dtype == tl.bfloat16:
        odd = ((codes << 1) | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - (128.0 + TOP)
    elif dtype == tl.float16:
        odd = ((codes << 1) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - (1024.0 + TOP)
    else:
        odd = (2 * codes - TOP).to(dtype)
    return odd


@triton.jit
def kept_level(
    codes,
    places,
    quad,
    offset: tl.constexpr,
    BITS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Column ``offset`` of a lane's quad: the level of the kept value that lies there, or 0."""
    first = levels(codes, 2 * quad * BITS, BITS, dtype)
    second = levels(codes, (2 * quad + 1) * BITS, BITS, dtype)
    at_first = ((places >> (4 * quad)) & 3) == offset
    at_second = ((places >> (4 * quad + 2)) & 3) == offset
    return tl.where(at_first, first, tl.where(at_second, second, tl.zeros_like(second)))


@triton.jit
def split_quads(x_ML4):
    """[M, 4 L] -> the four columns of each lane's quad, transposed: four times [L, M]."""
    M: tl.constexpr = x_ML4.shape[0]
    L: tl.constexpr = x_ML4.shape[1] // 4
    even, odd = tl.split(tl.reshape(x_ML4, (M, L, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return tl.trans(x0), tl.trans(x1), tl.trans(x2), tl.trans(x3)


@triton.jit
def load_words(words, tile, n_N, real_N, num_out, lane_L):
    """A tile's words [N, L], widened to int32. Read once: the cache need not keep them."""
    L: tl.constexpr = lane_L.shape[0]
    at = (tile * num_out + n_N)[:, None] * L + lane_L[None, :]
    loaded = tl.load(words + at, mask=real_N[:, None], other=0, eviction_policy="evict_first")
    return loaded.to(tl.int32)


@triton.jit
def add_step(
    run_NM, codes, places, i, x_rows, real_M, k, real_K, CODEC: tl.constexpr, BITS: tl.constexpr
):
    """run + step i of a tile times the chunk's rows at the inputs ``k``."""
    dtype: tl.constexpr = x_rows.dtype.element_ty
    if CODEC == "int":
        x_LM = tl.load(
            x_rows[None, :] + k[:, None],
            mask=real_M[None, :] & real_K[:, None],
            other=0.0,
            eviction_policy="evict_last",
        )
        w_NL = levels(codes, i * BITS, BITS, dtype)
        run_NM = tl.dot(w_NL, x_LM, run_NM, input_precision="ieee")
    else:
        x_ML4 = tl.load(
            x_rows[:, None] + k[None, :],
            mask=real_M[:, None] & real_K[None, :],
            other=0.0,
            eviction_policy="evict_last",
        )
        x_quads = split_quads(x_ML4)
        for offset in tl.static_range(4):
            w_NL = kept_level(codes, places, i, offset, BITS, dtype)
            run_NM = tl.dot(w_NL, x_quads[offset], run_NM, input_precision="ieee")
    return run_NM


@triton.jit
def packed_matmul(
    y_TN,
    partial_XTN,
    x_TK,
    table_SF,
    num_slots,
    slot_C,
    start_C,
    end_C,
    stride_y,
    stride_x,
    num_rows,
    num_in,
    width,
    CODEC: tl.constexpr,
    BITS: tl.constexpr,
    LANES: tl.constexpr,
    RUN: tl.constexpr,
    INDEXED: tl.constexpr,
    FIELDS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (C, blocks of N, SPLIT). Adds to y, or if SPLIT > 1 writes partial sums."""
    # A word holds the codes of eight inputs, or those kept of four quads.
    STEPS: tl.constexpr = 8 if CODEC == "int" else 4
    STEP_K: tl.constexpr = LANES if CODEC == "int" else 4 * LANES
    chunk = tl.program_id(0)
    fields = fields_of(table_SF, tl.load(slot_C + chunk), num_slots, FIELDS)
    address = tl.load(fields)
    if address == 0:
        return
    num_out = tl.load(fields + 3).to(tl.int32)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.program_id(1) * BLOCK_N >= num_out:
        return
    words = packed_words(address, BITS)
    scales = operand(tl.load(fields + 1), tl.bfloat16)
    extra = tl.load(fields + 2)
    steps = tl.load(fields + 5).to(tl.int32)
    row_M, real_M = chunk_rows(start_C, end_C, chunk, BLOCK_M)
    real_N = n_N < num_out
    x_rows = x_TK + row_M.to(tl.int64) * stride_x

    tiles = tl.cdiv(num_in, STEPS * STEP_K)
    groups = tl.cdiv(tiles * STEPS, steps)
    total = tiles * tl.load(fields + 4).to(tl.int32)
    share = tl.cdiv(total, SPLIT)
    begin = tl.program_id(2) * share
    lane_L = tl.arange(0, LANES)
    k_step = tl.arange(0, STEP_K)
    sum_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for tile in range(begin, tl.minimum(begin + share, total)):
        plane = tile // tiles
        first_step = (tile - plane * tiles) * STEPS
        codes = load_words(words, tile, n_N, real_N, num_out, lane_L)
        places = codes
        if CODEC == "nm24":
            places = load_words(operand(extra, tl.int16), tile, n_N, real_N, num_out, lane_L)
        for run in tl.static_range(STEPS // RUN):
            run_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for i in tl.static_range(run * RUN, (run + 1) * RUN):
                k = (first_step + i) * STEP_K + k_step
                run_NM = add_step(
                    run_NM, codes, places, i, x_rows, real_M, k, k < num_in, CODEC, BITS
                )
            group = plane * groups + (first_step + run * RUN) // steps
            scale_N = tl.load(scales + group * num_out + n_N, mask=real_N, other=0.0)
            # Levels are doubled codes.
            sum_NM += run_NM * (scale_N.to(tl.float32) * 0.5)[:, None]

    if SPLIT > 1:
        row_at = (tl.program_id(2) * num_rows + row_M).to(tl.int64) * width
        at = partial_XTN + row_at[None, :] + n_N[:, None]
        tl.store(at, sum_NM, mask=real_M[None, :] & real_N[:, None])
    else:
        column_N = n_N
        if INDEXED:
            column_N = tl.load(operand(extra, tl.int32) + n_N, mask=real_N, other=0)
        add_to_output(y_TN, stride_y, row_M, real_M, column_N, real_N, sum_NM)


@triton.jit
def add_to_output(y_TN, stride_y, row_M, real_M, column_N, real_N, sum_NM):
    """y += sum in float32, rounded once."""
    at = y_TN + row_M[None, :].to(tl.int64) * stride_y + column_N[:, None]
    mask = real_M[None, :] & real_N[:, None]
    y = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, (y + sum_NM).to(y_TN.dtype.element_ty), mask=mask)


@triton.jit
def add_partials(
    y_TN,
    partial_XTN,
    table_SF,
    num_slots,
    slot_C,
    start_C,
    end_C,
    stride_y,
    num_rows,
    width,
    INDEXED: tl.constexpr,
    FIELDS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Second pass of a split ``packed_matmul``, grid (C, blocks of N): partial sums in order."""
    chunk = tl.program_id(0)
    fields = fields_of(table_SF, tl.load(slot_C + chunk), num_slots, FIELDS)
    if tl.load(fields) == 0:
        return
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real_N = n_N < tl.load(fields + 3).to(tl.int32)
    row_M, real_M = chunk_rows(start_C, end_C, chunk, BLOCK_M)
    mask = real_M[None, :] & real_N[:, None]
    sum_NM = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for split in tl.static_range(SPLIT):
        row_at = (split * num_rows + row_M).to(tl.int64) * width
        at = partial_XTN + row_at[None, :] + n_N[:, None]
        sum_NM += tl.load(at, mask=mask, other=0.0)
    column_N = n_N
    if INDEXED:
        listed = operand(tl.load(fields + 2), tl.int32)
        column_N = tl.load(listed + n_N, mask=real_N, other=0)
    add_to_output(y_TN, stride_y, row_M, real_M, column_N, real_N, sum_NM)


@triton.jit
def dequantise(
    out_NK,
    words,
    scales,
    places,
    num_out,
    num_in,
    planes,
    steps,
    CODEC: tl.constexpr,
    BITS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The difference [N, K], rounded once to its dtype. Grid (blocks of N, steps of K)."""
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real_N = n_N < num_out
    STEPS: tl.constexpr = 8 if CODEC == "int" else 4
    STEP_K: tl.constexpr = LANES if CODEC == "int" else 4 * LANES
    tiles = tl.cdiv(num_in, STEPS * STEP_K)
    groups = tl.cdiv(tiles * STEPS, steps)
    step = tl.program_id(1)
    i = step % STEPS
    lane_L = tl.arange(0, LANES)
    dtype: tl.constexpr = out_NK.dtype.element_ty
    out_rows = out_NK + n_N.to(tl.int64)[:, None] * num_in
    if CODEC == "int":
        sum_NL = tl.zeros((BLOCK_N, LANES), tl.float32)
        for plane in range(planes):
            tile = plane * tiles + step // STEPS
            codes = load_words(words, tile, n_N, real_N, num_out, lane_L)
            group = plane * groups + step // steps
            scale_N = tl.load(scales + group * num_out + n_N, mask=real_N, other=0.0)
            level = levels(codes, i * BITS, BITS, tl.float32)
            sum_NL += level * (scale_N.to(tl.float32) * 0.5)[:, None]
        k_L = step * STEP_K + lane_L
        mask = real_N[:, None] & (k_L < num_in)[None, :]
        tl.store(out_rows + k_L[None, :], sum_NL.to(dtype), mask=mask)
    else:
        codes = load_words(words, step // STEPS, n_N, real_N, num_out, lane_L)
        quads = load_words(places, step // STEPS, n_N, real_N, num_out, lane_L)
        scale_N = tl.load(scales + step // steps * num_out + n_N, mask=real_N, other=0.0)
        for offset in tl.static_range(4):
            level = kept_level(codes, quads, i, offset, BITS, tl.float32)
            k_L = step * STEP_K + lane_L * 4 + offset
            mask = real_N[:, None] & (k_L < num_in)[None, :]
            value = level * (scale_N.to(tl.float32) * 0.5)[:, None]
            tl.store(out_rows + k_L[None, :], value.to(dtype), mask=mask)
