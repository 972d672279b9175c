"""Deterministic mode: a token's logits depend on its model and its sequence alone, to the bit.

Matrix libraries choose how to add up by the shape that they are given, so a row's last bits
depend on how many rows stand beside it. Here every forward has one shape: ``TILE`` tokens of
one model, padded where there are fewer. What is computed for a token is then the same alone
and in a crowd, in a chunk of a prompt, as a decode step, and again after a preemption.

It costs speed: the base is read once for every model in the step instead of once.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F

from deltaserve.engine.routing import BASE_SLOT, Routing, Segment
from deltaserve.engine.runner import Runner, StepInput
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.types import TokenLogprobs
from deltaserve.errors import ConfigError
from deltaserve.kernels.attention import PagedBatch, TokenTile
from deltaserve.kernels.attention.tiles import KEYS

TILE = 16


class DeterministicRunner(Runner):
    """A Runner that computes in tiles. The KV cache must end with a block that no sequence has,
    into which padding is written."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Raises ConfigError if this machine's libraries treat the rows of a tile differently."""
        super().__init__(*args, **options)
        self._padding_slot = self.kv.k.shape[1] - 1
        self._check_rows_are_equal()

    def forward(self, inputs: StepInput) -> torch.Tensor:
        """The last layer's states of all tokens [T, D]."""
        assert inputs.batch is not None
        slots = inputs.routing.slot_T.tolist()
        context_TL = self._contexts(inputs.batch)
        parts = [
            self._tile(
                slot,
                inputs.ids_T[start:end],
                inputs.positions_T[start:end],
                inputs.batch.slot_mapping_T[start:end],
                context_TL[start:end],
            )
            for slot, start, end in _tiles(slots)
        ]
        return torch.cat(parts)

    def logits(self, hidden_SD: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Logits [S, V], float32; -inf past the vocabulary of a row's model."""
        parts = []
        for slot, start, end in _tiles(_slots(routing.logits, len(hidden_SD))):
            padded_TD = F.pad(hidden_SD[start:end], (0, 0, 0, TILE - (end - start)))
            logits_TV = self._head_tile(padded_TD, slot)
            # Row by row, because functions are rounded differently at the end of an array.
            parts += [self._cap(row_V) for row_V in logits_TV[: end - start]]
        width = max(map(len, parts))
        return torch.stack([F.pad(row, (0, width - len(row)), value=-torch.inf) for row in parts])

    def _describe(
        self, logits_SV: torch.Tensor, tokens: list[int], num_top: list[int]
    ) -> list[TokenLogprobs]:
        rows = zip(logits_SV.split(1), tokens, num_top, strict=True)
        return [super(DeterministicRunner, self)._describe(x, [t], [n])[0] for x, t, n in rows]

    def _sample(self, logits_SV: torch.Tensor, seqs: list[Sequence]) -> list[int]:
        sample = super()._sample
        return [sample(logits_SV[i : i + 1], [seq])[0] for i, seq in enumerate(seqs)]

    def _tile(
        self,
        slot: int,
        ids: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        context: torch.Tensor,
    ) -> torch.Tensor:
        """The states of up to ``TILE`` tokens of one model."""
        count = len(ids)
        missing = TILE - count
        length = -(-(int(positions.max()) + 1) // KEYS) * KEYS
        context = F.pad(context[:, :length], (0, max(0, length - context.shape[1])))
        tile = TokenTile(
            F.pad(slot_mapping, (0, missing), value=self._padding_slot),
            F.pad(positions, (0, missing)),
            F.pad(context, (0, 0, 0, missing), value=self._padding_slot),
        )
        self.step.routing = routing = self._routing(slot)
        embeds_TD = self.embed(F.pad(ids, (0, missing))[None])[0]
        return self.decode(embeds_TD, tile.positions_T, tile, routing)[:count]

    def _head_tile(self, hidden_TD: torch.Tensor, slot: int) -> torch.Tensor:
        self.step.routing = self._routing(slot)
        logits_TV: torch.Tensor = self.head(hidden_TD[None])[0]
        return logits_TV

    def _routing(self, slot: int) -> Routing:
        """A tile whose rows are all one model's."""
        segments = () if slot == BASE_SLOT else (Segment(slot, 0, TILE),)
        slot_T = torch.full((TILE,), slot, device=self.device)
        return Routing(tokens=segments, logits=segments, slot_T=slot_T)

    def _contexts(self, batch: PagedBatch) -> torch.Tensor:
        """[T, L]: the slots of each token's context."""
        starts = torch.tensor(batch.query_starts, device=self.device)
        offsets = torch.arange(batch.block_size, device=self.device)
        slots_RL = (batch.block_table_RB[:, :, None] * batch.block_size + offsets).flatten(1)
        return slots_RL.repeat_interleave(starts.diff(), dim=0)

    @torch.inference_mode()
    def _check_rows_are_equal(self) -> None:
        """One token in every row of a tile must give the same bits in each, and the same as among
        others."""
        generator = torch.Generator().manual_seed(0)
        count = min(TILE, self._padding_slot)
        ids = torch.randint(self.decoder.config.vocab_size, (count,), generator=generator)
        ids, places = ids.to(self.device), torch.arange(count, device=self.device)
        context = places.expand(count, -1)
        among = self._tile(BASE_SLOT, ids, places, places, context)
        for row in {0, count // 2, count - 1}:
            copies = [x[row].expand(TILE) for x in (ids, places, places)]
            alike = self._tile(BASE_SLOT, *copies, places.expand(TILE, -1))  # type: ignore[call-arg]
            logits = self._head_tile(alike, BASE_SLOT)
            if not ((alike == among[row]).all() and (logits == logits[0]).all()):
                raise ConfigError(
                    "deterministic mode is not possible here: this machine's matrix library rounds "
                    f"the rows of one batch differently (with {torch.get_num_threads()} threads); "
                    "try OMP_NUM_THREADS=1, or leave deterministic out"
                )


def _tiles(slots: list[int]) -> list[tuple[int, int, int]]:
    """(slot, start, end) of up to ``TILE`` neighbouring rows of one slot each."""
    found, start = [], 0
    for slot, run in groupby(slots):
        end = start + len(list(run))
        found += [(slot, first, min(first + TILE, end)) for first in range(start, end, TILE)]
        start = end
    return found


def _slots(segments: tuple[Segment, ...], num_rows: int) -> list[int]:
    slots = [BASE_SLOT] * num_rows
    for segment in segments:
        slots[segment.start : segment.end] = [segment.slot] * (segment.end - segment.start)
    return slots
