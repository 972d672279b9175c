"""Grids and tile sizes of the grouped kernels. T rows, C chunks, K inputs, N outputs, X splits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
import triton

from deltaserve.kernels.delta_matmul import triton as packed
from deltaserve.kernels.delta_matmul import triton_dense as dense
from deltaserve.kernels.delta_matmul.chunks import CHUNK_ROWS, RowChunks
from deltaserve.kernels.delta_matmul.layout import FIELDS, LANES, QUAD, Kind, Operand

if TYPE_CHECKING:
    from deltaserve.kernels.delta_matmul.grouped import Table

# Programs that one chunk of rows should make: two for each multiprocessor of an H100.
PROGRAMS = 256
MAX_SPLIT = 8
TILE_INPUTS = 512
SHRINK_SPLIT = 8
BLOCK_K = 64
MAX_REGISTERS = 255
WIDEST = (1, LANES[1][0])


@dataclass(frozen=True)
class Tile:
    """Outputs per program, warps, and stages of the pipeline that hides the loads."""

    block_n: int
    warps: int
    stages: int


# By (codec, bits). Few bits: more outputs per program, or reading the rows outweighs the words.
TILES = {
    ("int", 1): Tile(128, 8, 3),
    ("int", 2): Tile(128, 8, 3),
    ("int", 4): Tile(64, 4, 3),
    ("nm24", 2): Tile(64, 4, 3),
    ("nm24", 4): Tile(64, 4, 3),
}
DENSE_TILE = Tile(64, 4, 3)
ADD_TILE = Tile(256, 4, 1)


def register_limit(capability: tuple[int, int], kind: tuple[int, int]) -> dict[str, int]:
    """The packed kernels' compiler options; kind: (bits, lanes).

    Left alone, ptxas for GPUs before Hopper parks two to four values on the stack to fit one more
    program on a multiprocessor; with the widest words of 1 bit, the limit itself makes it do so.
    """
    limited = capability < (9, 0) and kind != WIDEST
    return {"maxnreg": MAX_REGISTERS} if limited else {}


@cache
def _own_limit(bits: int, lanes: int) -> dict[str, int]:
    if not torch.cuda.is_available():
        return {}
    return register_limit(torch.cuda.get_device_capability(), (bits, lanes))


def grouped(
    kind: Kind,
    table: Table,
    y_TN: torch.Tensor,
    x_TK: torch.Tensor,
    chunks: RowChunks,
    base_outputs: int,
) -> None:
    """Apply the operands of one kind to the chunks' rows, in place."""
    if kind.codec == "lowrank":
        _lowrank(kind, table, y_TN, x_TK, chunks)
    elif kind.codec == "rows":
        _listed_rows(table, y_TN, x_TK, chunks)
    else:
        _packed(kind, table, y_TN, x_TK, chunks, base_outputs)


def split_of(num_out: int, num_in: int, kind: Kind) -> int:
    """Into how many partial sums K is cut. It follows from the layer's shape alone, never from
    the batch: the order of a row's sums must not depend on its neighbours."""
    blocks = triton.cdiv(num_out, TILES[kind.codec, kind.bits].block_n)
    return max(1, min(MAX_SPLIT, PROGRAMS // blocks, triton.cdiv(num_in, TILE_INPUTS)))


def _packed(
    kind: Kind,
    table: Table,
    y_TN: torch.Tensor,
    x_TK: torch.Tensor,
    chunks: RowChunks,
    base_outputs: int,
) -> None:
    num_rows, num_in = x_TK.shape
    tile, width = TILES[kind.codec, kind.bits], table.num_outputs
    split = split_of(base_outputs, num_in, kind)
    partial_XTN = y_TN
    if split > 1:
        partial_XTN = torch.empty(split, num_rows, width, device=y_TN.device)
    routing = (*table.slots, chunks.slot_C, chunks.start_C, chunks.end_C)
    packed.packed_matmul[(len(chunks.slot_C), triton.cdiv(width, tile.block_n), split)](
        y_TN,
        partial_XTN,
        x_TK,
        *routing,
        y_TN.stride(0),
        x_TK.stride(0),
        num_rows,
        num_in,
        width,
        CODEC=kind.codec,
        BITS=kind.bits,
        LANES=kind.lanes,
        RUN=kind.run,
        INDEXED=kind.indexed,
        FIELDS=FIELDS,
        SPLIT=split,
        BLOCK_M=CHUNK_ROWS,
        BLOCK_N=tile.block_n,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **_own_limit(kind.bits, kind.lanes),
    )
    if split > 1:
        packed.add_partials[(len(chunks.slot_C), triton.cdiv(width, ADD_TILE.block_n))](
            y_TN,
            partial_XTN,
            *routing,
            y_TN.stride(0),
            num_rows,
            width,
            INDEXED=kind.indexed,
            FIELDS=FIELDS,
            SPLIT=split,
            BLOCK_M=CHUNK_ROWS,
            BLOCK_N=ADD_TILE.block_n,
            num_warps=ADD_TILE.warps,
        )


def _lowrank(
    kind: Kind, table: Table, y_TN: torch.Tensor, x_TK: torch.Tensor, chunks: RowChunks
) -> None:
    num_rows, num_in = x_TK.shape
    rank = table.rank
    partial_XTR = torch.empty(SHRINK_SPLIT, num_rows, rank, device=y_TN.device)
    routing = (chunks.slot_C, chunks.start_C, chunks.end_C)
    sizes = {
        "SPLIT": SHRINK_SPLIT,
        "FIELDS": FIELDS,
        "BLOCK_M": CHUNK_ROWS,
        "BLOCK_R": kind.block,
        "num_warps": DENSE_TILE.warps,
        "num_stages": DENSE_TILE.stages,
    }
    dense.lowrank_shrink[(len(chunks.slot_C), rank // kind.block, SHRINK_SPLIT)](
        partial_XTR,
        x_TK,
        *table.slots,
        *routing,
        x_TK.stride(0),
        num_rows,
        num_in,
        rank,
        BLOCK_K=BLOCK_K,
        **sizes,
    )
    blocks = triton.cdiv(table.num_outputs, DENSE_TILE.block_n)
    dense.lowrank_expand[(len(chunks.slot_C), blocks)](
        y_TN,
        partial_XTR,
        *table.slots,
        table.scale_S,
        *routing,
        y_TN.stride(0),
        num_rows,
        rank,
        BLOCK_N=DENSE_TILE.block_n,
        **sizes,
    )


def _listed_rows(table: Table, y_TN: torch.Tensor, x_TK: torch.Tensor, chunks: RowChunks) -> None:
    blocks = triton.cdiv(table.num_outputs, DENSE_TILE.block_n)
    if blocks == 0:
        return
    dense.listed_rows[(len(chunks.slot_C), blocks)](
        y_TN,
        x_TK,
        *table.slots,
        chunks.slot_C,
        chunks.start_C,
        chunks.end_C,
        y_TN.stride(0),
        x_TK.stride(0),
        x_TK.shape[1],
        FIELDS=FIELDS,
        BLOCK_M=CHUNK_ROWS,
        BLOCK_N=DENSE_TILE.block_n,
        BLOCK_K=BLOCK_K,
        num_warps=DENSE_TILE.warps,
        num_stages=DENSE_TILE.stages,
    )


def dequantised(operand: Operand, num_in: int, dtype: torch.dtype) -> torch.Tensor:
    """The dense difference [N, K] of a packed operand, rounded once."""
    kind, (words, scales) = operand.kind, operand.parts[:2]
    places = operand.parts[2] if kind.codec == "nm24" else words
    num_out, planes, steps = operand.fields[3:6]
    out_NK = torch.empty(num_out, num_in, dtype=dtype, device=words.device)
    tile = TILES[kind.codec, kind.bits]
    step_inputs = kind.lanes if kind.codec == "int" else kind.lanes * QUAD
    grid = (triton.cdiv(num_out, tile.block_n), triton.cdiv(num_in, step_inputs))
    packed.dequantise[grid](
        out_NK,
        words,
        scales,
        places,
        num_out,
        num_in,
        planes,
        steps,
        CODEC=kind.codec,
        BITS=kind.bits,
        LANES=kind.lanes,
        BLOCK_N=tile.block_n,
        num_warps=tile.warps,
    )
    return out_NK
