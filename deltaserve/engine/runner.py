"""Execute: a plan becomes tensors, the tensors logits, the logits tokens.

T packed tokens, R rows (sequences), S rows that draw a token, V vocabulary, D hidden size.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from deltaserve.engine import logprobs
from deltaserve.engine.logits import adjust
from deltaserve.engine.model import KVCache
from deltaserve.engine.pooling import pool
from deltaserve.engine.routing import Routing, StepContext, segments
from deltaserve.engine.scheduler import StepPlan
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.types import TokenLogprobs
from deltaserve.kernels.attention import PagedBatch, TokenTile
from deltaserve.kernels.sampling import Draw, counter_uniform, sample


@dataclass(frozen=True, eq=False)
class StepInput:
    """Everything the device needs for one step."""

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    last_S: torch.Tensor
    batch: PagedBatch
    routing: Routing


class Runner:
    """Owns the model and its KV cache; stateless between steps."""

    def __init__(
        self, model: nn.Module, step: StepContext, kv: KVCache, *, block_size: int, device: str
    ) -> None:
        causal_lm: Any = model
        self.decoder = causal_lm.get_decoder()
        self.head = causal_lm.get_output_embeddings()
        self.softcap: float | None = getattr(causal_lm.config, "final_logit_softcapping", None)
        self.step = step
        self.kv = kv
        self.block_size = block_size
        self.device = device
        self._mask_worker = ThreadPoolExecutor(1, thread_name_prefix="deltaserve-masks")

    @torch.inference_mode()
    def execute(self, plan: StepPlan, vocab_sizes: dict[int, int]) -> dict[Sequence, int]:
        """Compute the plan's rows -> the token drawn for each row that reached its end.

        vocab_sizes: slot -> how many tokens its model knows.
        """
        drawing = [row.seq for row in plan.rows if row.samples]
        masks = self._start_masks(drawing)
        inputs = self.prepare(plan)
        hidden_TD = self.forward(inputs)
        self._score_prompts(plan, inputs.routing, hidden_TD, vocab_sizes)
        pool(plan.rows, hidden_TD)
        if not drawing:
            return {}
        logits_SV = self.logits(hidden_TD[inputs.last_S], inputs.routing)
        _mask_foreign_tokens(logits_SV, [vocab_sizes[seq.slot] for seq in drawing])
        asking = [s for s, seq in enumerate(drawing) if seq.request.sampling.logprobs is not None]
        raw_AV = logits_SV[asking] if asking else None
        for s, allowed in masks:
            _mask_disallowed(logits_SV[s], drawing[s], allowed.result())
        adjust(logits_SV, drawing)
        tokens = self._sample(logits_SV, drawing)
        if raw_AV is not None:
            self._score_answers(raw_AV, [drawing[s] for s in asking], [tokens[s] for s in asking])
        for s, _ in masks:
            _accept(drawing[s], tokens[s])
        return dict(zip(drawing, tokens, strict=True))

    def prepare(self, plan: StepPlan) -> StepInput:
        rows = plan.rows
        lens_R = np.array([row.num_new for row in rows])
        positions = np.concatenate([np.arange(r.start, r.start + r.num_new) for r in rows])
        ids = [t for r in rows for t in r.seq.token_ids[r.start : r.start + r.num_new]]
        slots_R = np.array([row.seq.slot for row in rows])
        ends_R = lens_R.cumsum()
        samples_R = np.array([row.samples for row in rows])
        slot_T = np.repeat(slots_R, lens_R)
        return StepInput(
            ids_T=self._tensor(np.array(ids)),
            positions_T=self._tensor(positions),
            last_S=self._tensor(ends_R[samples_R] - 1),
            batch=self._paged_batch(plan, positions, lens_R),
            routing=Routing(
                tokens=segments(slot_T.tolist()),
                logits=segments(slots_R[samples_R].tolist()),
                slot_T=self._tensor(slot_T),
            ),
        )

    def forward(self, inputs: StepInput) -> torch.Tensor:
        """One packed step of the model -> the last layer's states of all tokens [T, D]."""
        return self._decode(inputs.ids_T, inputs.positions_T, inputs.batch, inputs.routing)

    def _decode(
        self,
        ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        batch: PagedBatch | TokenTile,
        routing: Routing,
    ) -> torch.Tensor:
        self.step.routing = routing
        hidden_1TD: torch.Tensor = self.decoder(
            input_ids=ids_T[None],
            position_ids=positions_T[None],
            use_cache=False,
            kv=self.kv,
            batch=batch,
        ).last_hidden_state
        return hidden_1TD[0]

    def logits(self, hidden_SD: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Logits [S, V], float32, of states whose deltas are those of ``routing.logits``.

        Apart from the decoder, so that a long prompt's can be computed in pieces.
        """
        self.step.routing = routing
        return self._cap(self.head(hidden_SD[None])[0])

    def _cap(self, logits: torch.Tensor) -> torch.Tensor:
        """What some families do behind the head (Gemma 2), and float32."""
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.float()

    def _score_prompts(
        self,
        plan: StepPlan,
        routing: Routing,
        hidden_TD: torch.Tensor,
        vocab_sizes: dict[int, int],
    ) -> None:
        """Append the logprobs of prompts that the step has computed a part of."""
        first = 0  # the row's first token in the packed step
        for row in plan.rows:
            seq, positions = row.seq, logprobs.missing_positions(row)
            vocab_size = vocab_sizes[seq.slot]
            length = max(1, logprobs.CHUNK_BYTES // (4 * vocab_size))
            for start in range(positions.start, positions.stop, length):
                stop = min(start + length, positions.stop)
                index = slice(first + start - row.start, first + stop - row.start)
                own = replace(routing, logits=segments([seq.slot] * (stop - start)))
                logits_PV = self.logits(hidden_TD[index], own)[:, :vocab_size]
                num_top = [seq.request.sampling.prompt_logprobs or 0] * (stop - start)
                targets = seq.token_ids[start + 1 : stop + 1]
                seq.prompt_logprobs += self._describe(logits_PV, targets, num_top)
            first += row.num_new

    def _score_answers(self, raw_AV: torch.Tensor, seqs: list[Sequence], tokens: list[int]) -> None:
        """Note the logprobs of the drawn tokens. A rows whose requests asked for them."""
        num_top = [seq.request.sampling.logprobs or 0 for seq in seqs]
        for seq, found in zip(seqs, self._describe(raw_AV, tokens, num_top), strict=True):
            seq.logprobs = found

    def _describe(
        self, logits_SV: torch.Tensor, tokens: list[int], num_top: list[int]
    ) -> list[TokenLogprobs]:
        return logprobs.describe(logits_SV, tokens, num_top)

    def _paged_batch(self, plan: StepPlan, positions: np.ndarray, lens_R: np.ndarray) -> PagedBatch:
        width = max(len(row.seq.blocks) for row in plan.rows)
        table = np.zeros((len(plan.rows), width), dtype=np.int64)
        for r, row in enumerate(plan.rows):
            table[r, : len(row.seq.blocks)] = row.seq.blocks
        row_T = np.repeat(np.arange(len(plan.rows)), lens_R)
        blocks_T = table[row_T, positions // self.block_size]
        return PagedBatch(
            slot_mapping_T=self._tensor(blocks_T * self.block_size + positions % self.block_size),
            block_table_RB=self._tensor(table),
            context_lens=[row.start + row.num_new for row in plan.rows],
            query_starts=[0, *lens_R.cumsum().tolist()],
            block_size=self.block_size,
        )

    def _sample(self, logits_SV: torch.Tensor, seqs: list[Sequence]) -> list[int]:
        return sample(logits_SV, [_draw(seq) for seq in seqs])

    def _start_masks(self, drawing: list[Sequence]) -> list[tuple[int, Future[np.ndarray]]]:
        """Find out beside the device's work which tokens may be drawn: (row, [V] bool), for
        the rows that may not draw all."""
        return [
            (s, self._mask_worker.submit(seq.matcher.mask))
            for s, seq in enumerate(drawing)
            if seq.matcher is not None
        ]

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def _draw(seq: Sequence) -> Draw | None:
    """How the next token is drawn; None is the likeliest."""
    params = seq.request.sampling
    if params.temperature == 0:
        return None
    uniform = counter_uniform(seq.seed, seq.num_generated)
    return Draw(params.temperature, params.top_k, params.top_p, uniform)


def _mask_disallowed(logits_V: torch.Tensor, seq: Sequence, allowed_V: np.ndarray) -> None:
    if not allowed_V.any():
        seq.failure = "the grammar allows no token of the model's vocabulary here"
        return
    mask = torch.from_numpy(~allowed_V).to(logits_V.device)
    logits_V[: len(mask)].masked_fill_(mask, float("-inf"))


def _accept(seq: Sequence, token: int) -> None:
    if seq.matcher is not None and seq.failure is None:
        seq.matcher.accept(token)


def _mask_foreign_tokens(logits_SV: torch.Tensor, vocab_sizes: list[int]) -> None:
    """Added tokens of one fine-tune do not exist for the others in the batch."""
    width = logits_SV.shape[-1]
    if min(vocab_sizes) == width:
        return
    for row, size in enumerate(vocab_sizes):
        if size < width:
            logits_SV[row, size:] = float("-inf")
