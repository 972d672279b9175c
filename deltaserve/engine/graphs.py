"""Decode steps as CUDA graphs: captured once for each number of rows, replayed with new inputs.

A decode step of a large model is some hundreds of kernels of a few microseconds each; launched one
by one, the host is slower than the device. What a captured step reads lies at fixed addresses and
is written anew before each replay, in two copies from pinned memory and one of the block table.
Rows that are missing up to the captured number are padding: they compute a token of their own and
write it to a block that no sequence has.

Captured is the decoder, from the embeddings on. What changes its shape stays outside: embeddings,
head and sampling. R rows, D hidden size, B blocks of the longest sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deltaserve.engine.routing import Routing, Segment, StepContext
from deltaserve.kernels.attention import PagedBatch
from deltaserve.kernels.delta_matmul import RowChunks, idle_table
from deltaserve.kernels.staging import copy_into

logger = logging.getLogger(__name__)

SETTLE_STEPS = 8
"""Steps with deltas that run uncaptured after the deltas' tables have changed: while deltas come
and go, capturing would cost more than it saves."""

Decode = Callable[[torch.Tensor, torch.Tensor, PagedBatch, Routing], torch.Tensor]
"""(embeddings [R, D], positions [R], batch, routing) -> the last layer's states [R, D]."""
Replay = Callable[[], torch.Tensor]
Capture = Callable[[Replay], Replay]
"""What computes on the static inputs -> what does the same again, faster."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What is captured apart: the number of rows, and whether any of them may run a delta."""

    rows: int
    deltas: bool


@dataclass(frozen=True, eq=False)
class HostStep:
    """One step as planned, T tokens in R rows, on the host. table_RB: block table."""

    ids_T: np.ndarray
    positions_T: np.ndarray
    slot_T: np.ndarray
    slot_mapping_T: np.ndarray
    table_RB: np.ndarray
    context_lens: list[int]
    segments: tuple[Segment, ...]


class CudaCapture:
    """Captures with one pool of memory for all; the largest should come first."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Replay) -> Replay:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # compiles what is compiled at first use, which a capture does not allow
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads load deltas meanwhile: only this one's calls belong to the graph.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = work()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay


class StaticInputs:
    """What captured steps of up to R rows read; smaller ones use the first rows."""

    def __init__(self, embeds_RD: torch.Tensor, num_blocks: int, spare_slot: int) -> None:
        """embeds_RD: shape, dtype and device. num_blocks: of the longest sequence. spare_slot: of
        the cache, for what padding writes."""
        rows, device = len(embeds_RD), embeds_RD.device
        self.embeds_RD = torch.zeros_like(embeds_RD)
        self.table_RB = torch.zeros(rows, num_blocks, dtype=torch.long, device=device)
        wide_3R = torch.zeros(3, rows, dtype=torch.long, device=device)
        self.positions_R, self.slot_mapping_R, self.slot_R = wide_3R
        narrow_4R = torch.zeros(4, rows, dtype=torch.int32, device=device)
        self.len_R, self.chunks_3R = narrow_4R[0], narrow_4R[1:]
        self._wide, self._narrow = wide_3R, narrow_4R
        self._spare_slot = spare_slot
        self.fill(_NOTHING)

    def fill(self, step: HostStep) -> None:
        """Write a step's inputs, padding behind them; waits for nothing."""
        rows, count = self._wide.shape[1], len(step.positions_T)
        wide = np.zeros((3, rows), dtype=np.int64)
        wide[0, :count] = step.positions_T
        wide[1] = self._spare_slot
        wide[1, :count] = step.slot_mapping_T
        wide[2, :count] = step.slot_T
        narrow = torch.ones(4, rows, dtype=torch.int32)  # padding sees one token
        narrow[0, :count] = torch.tensor(step.context_lens, dtype=torch.int32)
        narrow[1:] = idle_table(step.segments, rows)
        copy_into(self._wide, torch.from_numpy(wide))
        copy_into(self._narrow, narrow)
        if count:
            width = step.table_RB.shape[1]
            copy_into(self.table_RB[:count, :width], torch.from_numpy(step.table_RB))


class DecodeGraphs:
    """The captured steps of one engine, and which of them serves a step."""

    def __init__(
        self,
        decode: Decode,
        step: StepContext,
        inputs: StaticInputs,
        capture: Capture,
        **attention: Any,
    ) -> None:
        """attention: longest, block_size and span of ``PagedBatch.static``."""
        self.inputs = inputs
        self.sizes = sizes_up_to(len(inputs.embeds_RD))
        self.replays = 0
        self._decode = decode
        self._step = step
        self._capture = capture
        self._attention = attention
        self._captured: dict[Shape, Replay] = {}
        self._changes = step.changes
        self._settled = SETTLE_STEPS

    def warm_up(self) -> None:
        """Capture all, the largest first: the others then fit into its memory."""
        for rows in reversed(self.sizes):
            for deltas in (True, False):
                self._replay(Shape(rows, deltas))
        logger.info("decode steps captured for %s rows", ", ".join(map(str, self.sizes)))

    def choose(self, slot_of_row: Collection[int]) -> Shape | None:
        """Which captured step serves decode rows of these slots; None: none does."""
        rows, slots = len(slot_of_row), set(slot_of_row)
        if rows > self.sizes[-1] or self._step.uncapturable(slots):
            return None
        deltas = any(slots)
        if deltas and not self._is_settled():
            return None
        return Shape(next(size for size in self.sizes if size >= rows), deltas)

    def run(self, shape: Shape, embeds_RD: torch.Tensor) -> torch.Tensor:
        """The last layer's states [R, D] of the rows that ``inputs`` was filled with. Theirs is
        the memory of the next replay too."""
        count = len(embeds_RD)
        self.inputs.embeds_RD[:count] = embeds_RD
        self.replays += 1
        return self._replay(shape)()[:count]

    def _is_settled(self) -> bool:
        if self._step.changes != self._changes:
            self._changes, self._settled = self._step.changes, 0
            for shape in [shape for shape in self._captured if shape.deltas]:
                del self._captured[shape]
        self._settled += 1
        return self._settled > SETTLE_STEPS

    def _replay(self, shape: Shape) -> Replay:
        if shape not in self._captured:
            self._captured[shape] = self._capture(self._work(shape))
        return self._captured[shape]

    def _work(self, shape: Shape) -> Replay:
        static, rows = self.inputs, shape.rows
        batch = PagedBatch.static(
            static.slot_mapping_R[:rows],
            static.table_RB[:rows],
            static.len_R[:rows],
            **self._attention,
        )
        slot_C, start_C, end_C = static.chunks_3R[:, :rows]
        chunks = RowChunks(slot_C, start_C, end_C, None) if shape.deltas else None
        routing = Routing((), (), static.slot_R[:rows], static=chunks, captured=True)
        embeds_RD, positions_R = static.embeds_RD[:rows], static.positions_R[:rows]
        return lambda: self._decode(embeds_RD, positions_R, batch, routing)


def sizes_up_to(rows: int) -> list[int]:
    """Numbers of rows that are captured: powers of two, then steps of 16."""
    sizes = [1, 2, 4, 8, *range(16, rows, 16), rows]
    return sorted({size for size in sizes if size <= rows})


_EMPTY = np.zeros(0, dtype=np.int64)
_NOTHING = HostStep(_EMPTY, _EMPTY, _EMPTY, _EMPTY, _EMPTY, [], ())
