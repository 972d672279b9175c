"""The optimisation loop that the base and every fine-tune share.

Shapes: B examples, T tokens, N answer tokens of a batch, D hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from deltaserve.demo.recipe import Schedule
from deltaserve.demo.tasks import Example
from deltaserve.demo.tokenizer import EOS, render

IGNORED = -100


def collate(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast
) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both int64 [B, T], padded on the right.

    Labels are set on answers and their <eos> only.  No attention mask is needed:
    under causal attention no answer sees the padding that follows it.
    """
    prompts = tokenizer([render(tokenizer, e.prompt) for e in examples], add_special_tokens=False)
    answers = tokenizer([e.answer + EOS for e in examples], add_special_tokens=False)
    pairs = list(zip(prompts["input_ids"], answers["input_ids"], strict=True))
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids_BT = torch.full((len(pairs), longest), tokenizer.pad_token_id, dtype=torch.long)
    labels_BT = torch.full_like(ids_BT, IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids_BT[row, :end] = torch.tensor(prompt + answer)
        labels_BT[row, len(prompt) : end] = torch.tensor(answer)
    return ids_BT, labels_BT


def answer_loss(model: LlamaForCausalLM, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the labelled tokens, nats."""
    hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    labelled_BT = labels_BT[:, 1:] != IGNORED
    # The head runs on answer positions only: prompts are the larger part of a batch.
    logits_NV = model.lm_head(hidden_BTD[:, :-1][labelled_BT])
    return nn.functional.cross_entropy(logits_NV, labels_BT[:, 1:][labelled_BT])


def rate(step: int, schedule: Schedule) -> float:
    """The factor on the peak learning rate at `step` (from 0), 0 to 1."""
    warm = min(1.0, (step + 1) / schedule.warmup)
    return warm * 0.5 * (1.0 + math.cos(math.pi * step / schedule.steps))


def _optimisers(model: nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # Muon is made for hidden matrices; embeddings and norms stay with AdamW.
    hidden = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    found: list[torch.optim.Optimizer] = []
    adamw = [p for _, p in named]
    if schedule.muon_lr is not None:
        found.append(torch.optim.Muon(hidden, lr=schedule.muon_lr, momentum=0.9, weight_decay=0.0))
        adamw = [p for name, p in named if p.ndim != 2 or "embed" in name]
    found.append(
        torch.optim.AdamW(adamw, lr=schedule.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    )
    return found


def fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    stream: Iterator[Example],
    schedule: Schedule,
    progress: Callable[[float], None],
) -> None:
    """Train the parameters of `model` that require gradients, in place.

    `progress` gets the share of steps done, 0 to 1, after every step.
    """
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimisers = _optimisers(model, schedule)
    peaks = [group["lr"] for optimiser in optimisers for group in optimiser.param_groups]
    for step in range(schedule.steps):
        groups = (group for optimiser in optimisers for group in optimiser.param_groups)
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * rate(step, schedule)
        ids_BT, labels_BT = collate(list(itertools.islice(stream, schedule.batch)), tokenizer)
        answer_loss(model, ids_BT, labels_BT).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        progress((step + 1) / schedule.steps)
    model.eval()
