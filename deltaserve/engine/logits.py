"""What requests ask to be done to their logits before a token is drawn.

Done in the order of vLLM: bias and forbidden ends, then penalties, then min_p. Rows that ask for
nothing cost nothing. S rows that draw, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from deltaserve.engine.sequence import Sequence
from deltaserve.engine.types import SamplingParams
from deltaserve.kernels.staging import to_device

Asking = list[tuple[int, Sequence]]
"""Rows of the logits, and whose they are."""


def asks(params: SamplingParams) -> bool:
    """Whether anything here applies to a request."""
    return bool(
        params.logit_bias
        or params.min_tokens
        or params.min_p
        or params.frequency_penalty
        or params.presence_penalty
        or params.repetition_penalty != 1.0
    )


def adjust(logits_SV: torch.Tensor, seqs: list[Sequence]) -> None:
    """Change the float32 logits of the sequences that ask for it, in place."""
    asking = [(s, seq) for s, seq in enumerate(seqs) if asks(seq.request.sampling)]
    if asking:
        _bias(logits_SV, asking)
        _forbid_early_end(logits_SV, asking)
        _penalise_repetition(logits_SV, asking)
        _penalise_answer(logits_SV, asking)
        _cut_unlikely(logits_SV, asking)


def _bias(logits_SV: torch.Tensor, asking: Asking) -> None:
    biases = [(s, *bias) for s, seq in asking for bias in seq.request.sampling.logit_bias]
    if biases:
        rows, ids, values = zip(*biases, strict=True)
        place = _index(logits_SV, rows), _index(logits_SV, ids)
        added = to_device(torch.tensor(values, dtype=torch.float32), logits_SV.device)
        logits_SV.index_put_(place, added, accumulate=True)


def _forbid_early_end(logits_SV: torch.Tensor, asking: Asking) -> None:
    ends = [
        (s, token)
        for s, seq in asking
        if seq.num_generated < seq.request.sampling.min_tokens
        for token in seq.request.sampling.stop_token_ids
        if token < logits_SV.shape[1]
    ]
    if ends:
        rows, ids = zip(*ends, strict=True)
        logits_SV[_index(logits_SV, rows), _index(logits_SV, ids)] = float("-inf")


def _penalise_repetition(logits_SV: torch.Tensor, asking: Asking) -> None:
    """repetition_penalty (CTRL, Keskar et al. 2019) sees prompt and answer."""
    found = [(s, seq) for s, seq in asking if seq.request.sampling.repetition_penalty != 1.0]
    if found:
        place, lengths = _occurrences(logits_SV, found, [seq.token_ids for _, seq in found])
        penalty = _spread(
            logits_SV, [s.request.sampling.repetition_penalty for _, s in found], lengths
        )
        # A token that occurs twice is written twice with the same value.
        old = logits_SV[place]
        logits_SV[place] = torch.where(old > 0, old / penalty, old * penalty)


def _penalise_answer(logits_SV: torch.Tensor, asking: Asking) -> None:
    """OpenAI's frequency and presence penalties see the answer."""
    found = [
        (s, seq)
        for s, seq in asking
        if seq.num_generated
        and (seq.request.sampling.frequency_penalty or seq.request.sampling.presence_penalty)
    ]
    if found:
        answers = [seq.token_ids[seq.num_prompt :] for _, seq in found]
        place, lengths = _occurrences(logits_SV, found, answers)
        params = [seq.request.sampling for _, seq in found]
        presence = _spread(logits_SV, [p.presence_penalty for p in params], lengths)
        frequency = _spread(logits_SV, [p.frequency_penalty for p in params], lengths)
        logits_SV[place] = logits_SV[place] - presence  # once, however often it occurs
        logits_SV.index_put_(place, -frequency, accumulate=True)


def _cut_unlikely(logits_SV: torch.Tensor, asking: Asking) -> None:
    """min_p: only tokens at least that likely, relative to the likeliest, at the temperature."""
    found = [
        (s, p.temperature * math.log(p.min_p))
        for s, seq in asking
        if (p := seq.request.sampling).min_p > 0 and p.temperature > 0
    ]
    if found:
        rows, distances = zip(*found, strict=True)
        index = _index(logits_SV, rows)
        logits_MV = logits_SV[index]
        distance_M1 = to_device(torch.tensor(distances), logits_SV.device)[:, None]
        least_M1 = logits_MV.amax(-1, keepdim=True) + distance_M1
        logits_SV[index] = logits_MV.masked_fill_(logits_MV < least_M1, float("-inf"))


def _occurrences(
    logits_SV: torch.Tensor, found: Asking, tokens: list[list[int]]
) -> tuple[tuple[torch.Tensor, torch.Tensor], np.ndarray]:
    """((row, token) of every token of every list, the lists' lengths)."""
    lengths = np.array([len(ids) for ids in tokens])
    rows = np.repeat([s for s, _ in found], lengths)
    ids = np.concatenate([np.array(ids) for ids in tokens])
    device = logits_SV.device
    places = to_device(torch.from_numpy(rows), device), to_device(torch.from_numpy(ids), device)
    return places, lengths


def _spread(logits_SV: torch.Tensor, values: list[float], lengths: np.ndarray) -> torch.Tensor:
    """Each list's value, once for each of its tokens."""
    spread = np.repeat(np.array(values, dtype=np.float32), lengths)
    return to_device(torch.from_numpy(spread), logits_SV.device)


def _index(logits_SV: torch.Tensor, numbers: Iterable[int]) -> torch.Tensor:
    return to_device(torch.tensor(list(numbers), dtype=torch.long), logits_SV.device)
