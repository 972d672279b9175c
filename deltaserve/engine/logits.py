"""What a request asks to be done to its logits before a token is drawn.

Done in the order of vLLM: bias and forbidden ends, then penalties, then min_p. V vocabulary.
"""

from __future__ import annotations

import math

import torch

from deltaserve.engine.sequence import Sequence
from deltaserve.engine.types import SamplingParams


def adjust(logits_SV: torch.Tensor, seqs: list[Sequence]) -> None:
    """Change the float32 logits of each sequence that asks for it, in place."""
    for row, seq in zip(logits_SV, seqs, strict=True):
        params = seq.request.sampling
        _bias(row, params)
        _forbid_early_end(row, seq)
        _penalise(row, seq)
        _cut_unlikely(row, params)


def _bias(logits_V: torch.Tensor, params: SamplingParams) -> None:
    if params.logit_bias:
        ids, values = zip(*params.logit_bias, strict=True)
        index = torch.tensor(ids, device=logits_V.device)
        logits_V[index] += torch.tensor(values, device=logits_V.device)


def _forbid_early_end(logits_V: torch.Tensor, seq: Sequence) -> None:
    params = seq.request.sampling
    if seq.num_generated < params.min_tokens:
        known = [token for token in params.stop_token_ids if token < len(logits_V)]
        logits_V[torch.tensor(known, dtype=torch.long, device=logits_V.device)] = float("-inf")


def _penalise(logits_V: torch.Tensor, seq: Sequence) -> None:
    """repetition_penalty (CTRL, Keskar et al. 2019) sees prompt and answer; OpenAI's
    frequency and presence penalties see the answer."""
    params = seq.request.sampling
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(seq.token_ids)), device=logits_V.device)
        old = logits_V[seen]
        penalty = params.repetition_penalty
        logits_V[seen] = torch.where(old > 0, old / penalty, old * penalty)
    if params.frequency_penalty or params.presence_penalty:
        answer = torch.tensor(seq.token_ids[seq.num_prompt :], device=logits_V.device)
        ids, counts = answer.long().unique(return_counts=True)
        logits_V[ids] -= params.frequency_penalty * counts + params.presence_penalty


def _cut_unlikely(logits_V: torch.Tensor, params: SamplingParams) -> None:
    """min_p: only tokens at least that likely, relative to the likeliest, at the temperature."""
    if params.min_p > 0 and params.temperature > 0:
        least = logits_V.max() + params.temperature * math.log(params.min_p)
        logits_V.masked_fill_(logits_V < least, float("-inf"))
