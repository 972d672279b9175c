"""What attention must know of a step. T packed tokens, R sequences, P blocks of queries,
L longest context among the rows at hand, B blocks in the longest block table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch


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
    query_starts (R + 1 entries): where its new tokens begin in the packed batch.
    """

    slot_mapping_T: torch.Tensor
    block_table_RB: torch.Tensor
    context_lens: list[int]
    query_starts: list[int]
    block_size: int
    _prefill: dict[int, QueryBlocks | None] = field(default_factory=dict, init=False)

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
        return torch.tensor(values, dtype=torch.int32, device=self.block_table_RB.device)
