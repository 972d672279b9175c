"""Delta embedding in Triton: one launch looks up every token in its own fine-tune.

T tokens, S slots, N stored rows, D columns, L lanes. A program makes one token's row, a tile of
columns: the base's, plus what the token's delta stores of it. Layouts and the table of addresses
are those of the matmul (``delta_matmul/layout.py``), so that a tied head shares the operand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltaserve.kernels.delta_matmul.triton import fields_of, levels, operand, packed_words


@triton.jit
def place_of(index_R, count, token):
    """Where ``token`` stands in a sorted list, -1 if nowhere."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if tl.load(index_R + middle) < token:
            low = middle + 1
        else:
            high = middle
    found = low < count
    if found:
        found = tl.load(index_R + low) == token
    return tl.where(found, low, -1)


@triton.jit
def embed_packed(
    out_TD,
    id_T,
    slot_T,
    table_SF,
    num_slots,
    stride_out,
    num_in,
    scale,
    BITS: tl.constexpr,
    LANES: tl.constexpr,
    INDEXED: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Add an ``int`` difference to rows that hold the base's embedding; grid (T, tiles of D)."""
    token, tile = tl.program_id(0), tl.program_id(1)
    fields = fields_of(table_SF, tl.load(slot_T + token), num_slots, FIELDS)
    address = tl.load(fields)
    if address == 0:
        return
    num_rows = tl.load(fields + 3).to(tl.int32)
    row = tl.load(id_T + token).to(tl.int32)
    if INDEXED:
        row = place_of(operand(tl.load(fields + 2), tl.int32), num_rows, row)
    if (row < 0) | (row >= num_rows):
        return
    words = packed_words(address, BITS)
    scales = operand(tl.load(fields + 1), tl.bfloat16)
    planes, steps = tl.load(fields + 4).to(tl.int32), tl.load(fields + 5).to(tl.int32)
    tiles = tl.cdiv(num_in, 8 * LANES)
    groups = tl.cdiv(tiles * 8, steps)
    lane_L = tl.arange(0, LANES)
    out_row = out_TD + token.to(tl.int64) * stride_out
    for i in tl.static_range(8):
        step = tile * 8 + i
        sum_L = tl.zeros((LANES,), tl.float32)
        for plane in range(planes):
            at = ((plane * tiles + tile).to(tl.int64) * num_rows + row) * LANES
            code_L = tl.load(words + at + lane_L).to(tl.int32)
            group = plane * groups + step // steps
            level = tl.load(scales + group.to(tl.int64) * num_rows + row).to(tl.float32) * 0.5
            sum_L += levels(code_L, i * BITS, BITS, tl.float32) * level
        column_L = step * LANES + lane_L
        real_L = column_L < num_in
        base_L = tl.load(out_row + column_L, mask=real_L, other=0.0).to(tl.float32)
        # The model scales the sum (Gemma); the base's part is scaled already.
        tuned_L = base_L + sum_L * scale
        tl.store(out_row + column_L, tuned_L.to(out_TD.dtype.element_ty), mask=real_L)


@triton.jit
def embed_listed(
    out_TD,
    id_T,
    slot_T,
    table_SF,
    num_slots,
    stride_out,
    num_in,
    scale,
    FIELDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Replace rows that are stored whole; grid (T, blocks of D)."""
    token = tl.program_id(0)
    fields = fields_of(table_SF, tl.load(slot_T + token), num_slots, FIELDS)
    address = tl.load(fields)
    if address == 0:
        return
    row = tl.load(id_T + token).to(tl.int32)
    count = tl.load(fields + 2).to(tl.int32)
    place = place_of(operand(tl.load(fields + 1), tl.int32), count, row)
    if place < 0:
        return
    column_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    real_D = column_D < num_in
    values = operand(address, out_TD.dtype.element_ty)
    at = values + place.to(tl.int64) * num_in + column_D
    value_D = tl.load(at, mask=real_D, other=0.0).to(tl.float32) * scale
    out_row = out_TD + token.to(tl.int64) * stride_out
    tl.store(out_row + column_D, value_D.to(out_TD.dtype.element_ty), mask=real_D)
