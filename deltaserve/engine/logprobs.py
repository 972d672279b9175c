"""Log-probabilities of tokens, from the logits that the model gave: before bias, penalties,
temperature and grammar (vLLM's ``raw_logprobs``). S rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch

from deltaserve.engine.scheduler import Row
from deltaserve.engine.types import TokenLogprobs

CHUNK_BYTES = 32 << 20
"""Most memory that the logits of a prompt take at once, in float32."""


def describe(
    logits_SV: torch.Tensor, token_ids: Items[int], num_top: Items[int]
) -> list[TokenLogprobs]:
    """The logprobs of one token in each row of float32 logits, and of the row's likeliest.

    num_top: how many of the likeliest, for each row. Logits of -inf are no tokens of the model
    and never among them.
    """
    chosen_S1 = logits_SV.gather(1, torch.tensor(token_ids, device=logits_SV.device)[:, None])
    total_S1 = logits_SV.logsumexp(-1, keepdim=True)
    rank_S = 1 + (logits_SV > chosen_S1).sum(-1)
    top_logits, top_ids = logits_SV.topk(min(max(num_top), logits_SV.shape[1]))
    return [
        TokenLogprobs(token, logprob, rank, tuple(_finite(ids[:top], values[:top])))
        for token, logprob, rank, ids, values, top in zip(
            token_ids,
            (chosen_S1 - total_S1)[:, 0].tolist(),
            rank_S.tolist(),
            top_ids.tolist(),
            (top_logits - total_S1).tolist(),
            num_top,
            strict=True,
        )
    ]


def _finite(ids: list[int], values: list[float]) -> list[tuple[int, float]]:
    return [(i, value) for i, value in zip(ids, values, strict=True) if value > float("-inf")]


def missing_positions(row: Row) -> range:
    """Positions among the row's whose logits tell the logprob of the prompt's next token.

    A sequence that is computed again after a preemption keeps what it had.
    """
    seq = row.seq
    if seq.request.sampling.prompt_logprobs is None:
        return range(0)
    start = max(row.start, len(seq.prompt_logprobs))
    return range(start, min(row.start + row.num_new, seq.num_prompt - 1))
