"""Execute: a plan becomes tensors, the tensors logits, the logits tokens.

T packed tokens, R rows (sequences), S rows that draw a token, V vocabulary, D hidden size.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from deltaserve.engine import logprobs
from deltaserve.engine.families import rotary_waits
from deltaserve.engine.graphs import (
    Capture,
    CudaCapture,
    DecodeGraphs,
    HostStep,
    Shape,
    StaticInputs,
)
from deltaserve.engine.logits import adjust
from deltaserve.engine.model import KVCache
from deltaserve.engine.pooling import pool
from deltaserve.engine.routing import Routing, StepContext, segments
from deltaserve.engine.scheduler import StepPlan
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.types import TokenLogprobs
from deltaserve.errors import ConfigError
from deltaserve.kernels.attention import PagedBatch, TokenTile
from deltaserve.kernels.attention.batch import SPAN
from deltaserve.kernels.sampling import Draw, counter_uniform, sample
from deltaserve.kernels.staging import to_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class StepInput:
    """Everything the device needs for one step.

    shape: of the captured step that computes it and has a batch of its own.
    """

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    last_S: torch.Tensor
    batch: PagedBatch | None
    routing: Routing
    shape: Shape | None = None


class Runner:
    """Owns the model and its KV cache; stateless between steps."""

    def __init__(
        self,
        model: nn.Module,
        step: StepContext,
        kv: KVCache,
        *,
        block_size: int,
        device: str,
        span: int = SPAN,
    ) -> None:
        """span: see ``PagedBatch``."""
        causal_lm: Any = model
        self.decoder = causal_lm.get_decoder()
        self.embed = self.decoder.get_input_embeddings()
        self.head = causal_lm.get_output_embeddings()
        self.softcap: float | None = getattr(causal_lm.config, "final_logit_softcapping", None)
        self.step = step
        self.kv = kv
        self.block_size = block_size
        self.device = device
        self.span = span
        self.graphs: DecodeGraphs | None = None
        self._mask_worker = ThreadPoolExecutor(1, thread_name_prefix="deltaserve-masks")

    @torch.inference_mode()
    def use_graphs(self, capture: Capture, *, max_rows: int, max_model_len: int) -> None:
        """Compute decode steps of up to so many rows as captured ones, from now on.

        The KV cache must end with a block that no sequence has.
        """
        cache = self.kv.k
        embeds_RD = cache.new_zeros(max_rows, self.decoder.config.hidden_size)
        num_blocks = -(-max_model_len // self.block_size)
        self.graphs = DecodeGraphs(
            self.decode,
            self.step,
            StaticInputs(embeds_RD, num_blocks, cache.shape[1] - 1),
            capture,
            longest=max_model_len,
            block_size=self.block_size,
            span=self.span,
        )
        self.graphs.warm_up()

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
        raw_AV = logits_SV[self._tensor(np.array(asking))] if asking else None
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
        host = self._host_step(plan)
        lens_R = np.array([row.num_new for row in plan.rows])
        samples_R = np.array([row.samples for row in plan.rows])
        shape = None
        if self.graphs is not None and (lens_R == 1).all():
            shape = self.graphs.choose(host.slot_T.tolist())
        if self.graphs is not None and shape is not None:
            self.graphs.inputs.fill(host)
        return StepInput(
            ids_T=self._tensor(host.ids_T),
            positions_T=self._tensor(host.positions_T),
            last_S=self._tensor(lens_R.cumsum()[samples_R] - 1),
            batch=None if shape is not None else self._batch(host, lens_R),
            routing=Routing(
                tokens=host.segments,
                logits=segments([row.seq.slot for row in plan.rows if row.samples]),
                slot_T=self._tensor(host.slot_T),
                dense_rows=self.step.dense_rows,
            ),
            shape=shape,
        )

    def _batch(self, host: HostStep, lens_R: np.ndarray) -> PagedBatch:
        return PagedBatch(
            slot_mapping_T=self._tensor(host.slot_mapping_T),
            block_table_RB=self._tensor(host.table_RB),
            context_lens=host.context_lens,
            query_starts=[0, *lens_R.cumsum().tolist()],
            block_size=self.block_size,
            span=self.span,
        )

    def _host_step(self, plan: StepPlan) -> HostStep:
        rows = plan.rows
        lens_R = np.array([row.num_new for row in rows])
        positions_T = np.concatenate([np.arange(r.start, r.start + r.num_new) for r in rows])
        ids = [t for r in rows for t in r.seq.token_ids[r.start : r.start + r.num_new]]
        slot_T = np.repeat(np.array([row.seq.slot for row in rows]), lens_R)
        width = max(len(row.seq.blocks) for row in rows)
        table_RB = np.zeros((len(rows), width), dtype=np.int64)
        for r, row in enumerate(rows):
            table_RB[r, : len(row.seq.blocks)] = row.seq.blocks
        row_T = np.repeat(np.arange(len(rows)), lens_R)
        blocks_T = table_RB[row_T, positions_T // self.block_size]
        return HostStep(
            np.array(ids),
            positions_T,
            slot_T,
            blocks_T * self.block_size + positions_T % self.block_size,
            table_RB,
            [row.start + row.num_new for row in rows],
            segments(slot_T.tolist()),
        )

    def forward(self, inputs: StepInput) -> torch.Tensor:
        """One packed step of the model -> the last layer's states of all tokens [T, D]."""
        self.step.routing = inputs.routing
        embeds_TD: torch.Tensor = self.embed(inputs.ids_T[None])[0]
        if self.graphs is not None and inputs.shape is not None:
            return self.graphs.run(inputs.shape, embeds_TD)
        assert inputs.batch is not None
        return self.decode(embeds_TD, inputs.positions_T, inputs.batch, inputs.routing)

    def decode(
        self,
        embeds_TD: torch.Tensor,
        positions_T: torch.Tensor,
        batch: PagedBatch | TokenTile,
        routing: Routing,
    ) -> torch.Tensor:
        """The decoder without its embeddings -> states [T, D]."""
        self.step.routing = routing
        hidden_1TD: torch.Tensor = self.decoder(
            inputs_embeds=embeds_TD[None],
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
        return to_device(torch.from_numpy(array), self.device)


def capture_decoding(runner: Runner, config: Any, max_rows: int, max_model_len: int) -> None:
    """Capture decode steps as CUDA graphs, or say why they run uncaptured.

    config: of the model. Raises ConfigError when memory does not suffice.
    """
    if rotary_waits(config):
        logger.warning("decode steps are not captured: this model's rotary scaling forbids it")
        return
    try:
        runner.use_graphs(CudaCapture(), max_rows=max_rows, max_model_len=max_model_len)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"capturing decode steps of {max_rows} rows ran out of memory: lower max_num_seqs or "
            f"kv_cache_memory_bytes, or set enforce_eager ({error})"
        ) from error
    except RuntimeError as error:
        runner.graphs = None
        logger.warning("decode steps are not captured, which makes them slower: %s", error)


def _draw(seq: Sequence) -> Draw | None:
    """How the next token is drawn; None is the likeliest."""
    params = seq.request.sampling
    if params.temperature == 0:
        return None
    uniform = counter_uniform(seq.seed, seq.num_generated)
    return Draw(params.temperature, params.top_k, params.top_p, uniform)


def _mask_disallowed(logits_V: torch.Tensor, seq: Sequence, allowed_V: np.ndarray) -> None:
    if not allowed_V.any():
        seq.failure = (
            "the grammar allows no token of the model's vocabulary here, or is too large to follow"
        )
        return
    mask = to_device(torch.from_numpy(~allowed_V), logits_V.device)
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
