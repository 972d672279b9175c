"""What attention must know of a step. T packed tokens, R sequences, P blocks of queries,
L longest context among the rows at hand, B blocks in the longest block table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from deltaserve.kernels.staging import to_device

# Tokens of context per program of a decode row, and how many such programs at most.
SPAN = 512
MAX_SPANS = 16

MaskKind = tuple[int | None, torch.dtype]


def span_of(max_model_len: int) -> int:
    """How an engine cuts contexts, a power of two. It follows from the longest context that there
    may be, not from the batch's: the order of a row's sums must not depend on its neighbours."""
    span = SPAN
    while span * MAX_SPANS < max_model_len:
        span *= 2
    return span


@dataclass(frozen=True, eq=False)
class QueryBlocks:
    """Neighbouring queries of one sequence each, the work of one program.

    row_P: the sequence, first_P: the first query's packed index; int32 on the device, a negative
    row is padding. longest: context among them.
    """

    row_P: torch.Tensor
    first_P: torch.Tensor
    longest: int


@dataclass(eq=False)
class PagedBatch:
    """Where the packed tokens of one step lie, in the batch and in the cache.

    slot_mapping_T: slot that receives each new token. block_table_RB: the blocks of each
    sequence, padded with 0. context_lens: tokens of each sequence after this step, and
    query_starts (R + 1 entries): where its new tokens begin in the packed batch. span: tokens of
    context per program of a decode row. fixed: the tensors are not written anew.
    """

    slot_mapping_T: torch.Tensor
    block_table_RB: torch.Tensor
    context_lens: list[int]
    query_starts: list[int]
    block_size: int
    span: int = SPAN
    fixed: bool = True
    _prefill: dict[int, QueryBlocks | None] = field(default_factory=dict, init=False)
    _masks: dict[MaskKind, torch.Tensor] = field(default_factory=dict, init=False)

    @classmethod
    def static(
        cls,
        slot_mapping_R: torch.Tensor,
        block_table_RB: torch.Tensor,
        len_R: torch.Tensor,
        *,
        longest: int,
        block_size: int,
        span: int,
    ) -> PagedBatch:
        """R decode rows whose tensors are written anew before each run of a captured step.

        longest: context that any of them may ever have; what is launched follows from it alone.
        """
        rows = len(slot_mapping_R)
        starts = list(range(rows + 1))
        batch = cls(slot_mapping_R, block_table_RB, [longest] * rows, starts, block_size, span)
        batch.fixed = False
        batch.len_R = len_R
        index = torch.arange(rows, device=len_R.device)
        batch.decode_index = index, len_R, block_table_RB[:, : -(-longest // block_size)]
        # Made now: inside a capture nothing may be copied from the host.
        assert batch.decode_blocks is not None
        assert len(batch.start_R) == rows + 1
        return batch

    @cached_property
    def decode_rows(self) -> list[int]:
        """Sequences with a single new token; they are attended in one batched call."""
        return [r for r in range(len(self.context_lens)) if self._num_new(r) == 1]

    @cached_property
    def prefill_rows(self) -> list[int]:
        return [r for r in range(len(self.context_lens)) if self._num_new(r) > 1]

    @cached_property
    def decode_index(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(packed index, context length, blocks up to the longest context) of the decode rows."""
        device = self.block_table_RB.device
        rows = torch.tensor(self.decode_rows, device=device)
        index = torch.tensor([self.query_starts[r] for r in self.decode_rows], device=device)
        lens = [self.context_lens[r] for r in self.decode_rows]
        width = -(-max(lens) // self.block_size)
        return index, torch.tensor(lens, device=device), self.block_table_RB[rows, :width]

    def decode_mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores of the decode rows, [rows, 1, 1, L]: -inf where a key is not
        seen. window: a token sees itself and the ``window - 1`` before it. Made once per step."""
        mask = self._masks.get((window, dtype))
        if mask is None:
            _, lens, table = self.decode_index
            position_L = torch.arange(table.shape[1] * self.block_size, device=lens.device)
            unseen_RL = position_L >= lens[:, None]
            if window is not None:
                unseen_RL |= position_L < lens[:, None] - window
            mask = torch.zeros(unseen_RL.shape, dtype=dtype, device=lens.device)
            mask = mask.masked_fill_(unseen_RL, float("-inf"))[:, None, None]
            if self.fixed:
                self._masks[window, dtype] = mask
        return mask

    def _num_new(self, row: int) -> int:
        return self.query_starts[row + 1] - self.query_starts[row]

    @cached_property
    def start_R(self) -> torch.Tensor:
        """``query_starts`` on the device, R + 1 entries, int32."""
        return self._on_device(self.query_starts)

    @cached_property
    def len_R(self) -> torch.Tensor:
        return self._on_device(self.context_lens)

    @cached_property
    def decode_blocks(self) -> QueryBlocks | None:
        return self._blocks([(r, self.query_starts[r]) for r in self.decode_rows])

    def prefill_blocks(self, queries: int) -> QueryBlocks | None:
        """The other sequences' new tokens, ``queries`` at a time; made once per step."""
        if queries not in self._prefill:
            self._prefill[queries] = self._blocks(
                [
                    (r, first)
                    for r in self.prefill_rows
                    for first in range(self.query_starts[r], self.query_starts[r + 1], queries)
                ]
            )
        return self._prefill[queries]

    def _blocks(self, blocks: list[tuple[int, int]]) -> QueryBlocks | None:
        if not blocks:
            return None
        rows, firsts = zip(*blocks, strict=True)
        longest = max(self.context_lens[row] for row in rows)
        return QueryBlocks(self._on_device(rows), self._on_device(firsts), longest)

    def _on_device(self, values: Sequence[int]) -> torch.Tensor:
        return to_device(torch.tensor(values, dtype=torch.int32), self.block_table_RB.device)
