"""Two models on the same text: divergence, agreement, perplexity, greedy continuations.

B sequences of T tokens, V the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import log_softmax

from deltaserve.compress.common import Progress, silent
from deltaserve.compress.text import Sample, Text, batches
from deltaserve.errors import CompatibilityError

BATCH = 8
# exp() of more than this says nothing that this does not.
LARGEST_NLL = 700.0


@dataclass(frozen=True)
class Divergence:
    """Per token of the text: kl_N in nats, agrees_N bool, nll_*_N in nats of the next token."""

    kl_N: torch.Tensor
    agrees_N: torch.Tensor
    nll_fine_tune_N: torch.Tensor
    nll_delta_N: torch.Tensor


@dataclass(frozen=True)
class Continuations:
    """Where two greedy continuations first differ, -1 if nowhere, of each prompt."""

    first: list[int]

    @property
    def identical(self) -> float:
        """Share without any difference."""
        return self.first.count(-1) / len(self.first)

    @property
    def median(self) -> int:
        """Median place of the first difference among those that differ; -1 if none does."""
        places = sorted(place for place in self.first if place >= 0)
        return places[len(places) // 2] if places else -1


@torch.inference_mode()
def divergence(fine_tune: Any, other: Any, text: Text, report: Progress = silent) -> Divergence:
    """Compare the next-token distributions at every position that has a next token.

    Raises CompatibilityError if the two have different vocabularies.
    """
    rows: list[tuple[torch.Tensor, ...]] = []
    done, total = 0, sum(len(s.tokens) for s in text.samples)
    for ids_BT, lengths in batches(text.samples, BATCH):
        on_device_BT = ids_BT.to(fine_tune.device)
        logits = [
            model(input_ids=on_device_BT, use_cache=False).logits for model in (fine_tune, other)
        ]
        if logits[0].shape != logits[1].shape:
            raise CompatibilityError(
                f"the fine-tune has {logits[0].shape[-1]} tokens, base + delta has "
                f"{logits[1].shape[-1]}; this delta was made from another fine-tune"
            )
        for row, length in enumerate(lengths):
            targets_T = on_device_BT[row, 1:length]
            mine_TV, theirs_TV = (each[row, : length - 1] for each in logits)
            rows.append(_compare(mine_TV, theirs_TV, targets_T))
        done += sum(lengths)
        report("compare", done, total)
    return Divergence(*(torch.cat(parts).cpu() for parts in zip(*rows, strict=True)))


@torch.inference_mode()
def greedy(fine_tune: Any, other: Any, text: Text, prompts: int, tokens: int) -> Continuations:
    """Let both continue the first ``prompts`` prompts greedily by up to ``tokens`` tokens."""
    samples = text.samples[:prompts]
    first = []
    for start in range(0, len(samples), BATCH):
        some = samples[start : start + BATCH]
        mine, theirs = (continue_greedily(model, some, tokens) for model in (fine_tune, other))
        first += [_first_difference(a, b) for a, b in zip(mine, theirs, strict=True)]
    return Continuations(first)


def continue_greedily(model: Any, samples: Sequence[Sample], tokens: int) -> list[list[int]]:
    """The greedy tokens after each prompt, up to and without the end."""
    width = max(s.prompt for s in samples)
    ids_BT = torch.zeros(len(samples), width, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, sample in enumerate(samples):
        ids_BT[row, width - sample.prompt :] = torch.tensor(sample.tokens[: sample.prompt])
        mask_BT[row, width - sample.prompt :] = 1
    out_BT = model.generate(
        input_ids=ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        max_new_tokens=tokens,
        do_sample=False,
    )
    ends = model.generation_config.eos_token_id or []
    answers = []
    for answer in out_BT[:, width:].tolist():
        stop = next((i for i, token in enumerate(answer) if token in ends), len(answer))
        answers.append(answer[:stop])
    return answers


def percentile(values_N: torch.Tensor, share: float) -> float:
    """The smallest value that is not below ``share`` of all."""
    place = max(1, math.ceil(share * len(values_N)))
    return float(values_N.float().kthvalue(place).values)


def perplexity(nll_N: torch.Tensor) -> float:
    """exp of the mean, kept finite."""
    return math.exp(min(LARGEST_NLL, float(nll_N.double().mean())))


def _compare(
    mine_TV: torch.Tensor, theirs_TV: torch.Tensor, targets_T: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    log_p_TV, log_q_TV = (log_softmax(x_TV.float(), dim=-1) for x_TV in (mine_TV, theirs_TV))
    # Rounding can leave a sum of -1e-8 where the two are equal.
    kl_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).clamp(min=0)
    agrees_T = mine_TV.argmax(-1) == theirs_TV.argmax(-1)
    nll = (-x_TV.gather(1, targets_T[:, None])[:, 0] for x_TV in (log_p_TV, log_q_TV))
    return kl_T, agrees_T, *nll


def _first_difference(a: list[int], b: list[int]) -> int:
    for place, (mine, theirs) in enumerate(zip(a, b, strict=False)):
        if mine != theirs:
            return place
    return -1 if len(a) == len(b) else min(len(a), len(b))
