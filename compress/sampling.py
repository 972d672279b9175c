"""What a fine-tune writes: sampled text to calibrate and verify on, greedy continuations.

B sequences of T token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deltaserve.compress.text import BATCH, SAMPLED, Sample, Text

# Stands for a user's words when a chat template is cut open just before them.
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
GREEDY_BATCH = 8


@torch.inference_mode()
def sample_text(model: Any, tokenizer: Any, *, samples: int, seq_len: int, seed: int) -> Text:
    """What the model itself says, at temperature 1: batched, repeatable by ``seed``.

    Sequences start with the first token of every text, and, for a model with a chat
    template, every other one with the opening of a user's turn, so that the model asks and
    answers itself (Magpie, Xu et al., ICLR 2025).
    """
    openings = [_first_token(model.config, tokenizer), _user_turn(tokenizer)]
    starts = [opening for opening in openings if opening]
    found: list[Sample] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for number, start in enumerate(starts):
            count = len(range(number, samples, len(starts)))
            while count > 0:
                some = min(count, BATCH)
                found += _continue(model, [start] * some, seq_len)
                count -= some
    return Text(tuple(found), SAMPLED, seed)


def _continue(model: Any, starts: list[list[int]], seq_len: int) -> list[Sample]:
    ids_BT = torch.tensor(starts, device=model.device)
    out_BT = model.generate(
        input_ids=ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_length=max(seq_len, ids_BT.shape[1] + 1),
        do_sample=True,
        top_k=0,
    )
    ends = model.generation_config.eos_token_id or []
    found = []
    for tokens in out_BT.tolist():
        asked = ids_BT.shape[1]
        stop = next((i for i in range(asked, len(tokens)) if tokens[i] in ends), len(tokens) - 1)
        # Greedy continuations start after a quarter: enough to have something to go on.
        found.append(Sample(tuple(tokens[: stop + 1]), max(1, min(asked, stop), (stop + 1) // 4)))
    return found


def _first_token(config: Any, tokenizer: Any) -> list[int]:
    """The token that begins texts; models without one were trained on texts ended by eos."""
    settings = config.get_text_config()
    for found in (
        getattr(tokenizer, "bos_token_id", None),
        settings.bos_token_id,
        settings.eos_token_id,
    ):
        if isinstance(found, int):
            return [found]
    return [0]


def _user_turn(tokenizer: Any) -> list[int] | None:
    if tokenizer is None or not tokenizer.chat_template:
        return None
    text = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
    opening, mark, _ = text.partition(MARK)
    if not mark:
        return None
    ids: list[int] = tokenizer(opening, add_special_tokens=False)["input_ids"]
    return ids or None


@torch.inference_mode()
def continued_greedily(
    model: Any, samples: Sequence[Sample], tokens: int, context: int
) -> tuple[Sample, ...]:
    """The prompts of the samples, each with its greedy continuation of up to ``tokens`` tokens.

    A prompt that leaves no room within the context is left out.
    """
    fitting = [s for s in samples if s.prompt < context]
    found = []
    for start in range(0, len(fitting), GREEDY_BATCH):
        some = fitting[start : start + GREEDY_BATCH]
        room = min(tokens, context - max(s.prompt for s in some))
        for sample, answer in zip(some, _greedy(model, some, room), strict=True):
            prompt = sample.tokens[: sample.prompt]
            found.append(Sample((*prompt, *answer), sample.prompt))
    return tuple(found)


def _greedy(model: Any, samples: Sequence[Sample], tokens: int) -> list[list[int]]:
    """The greedy tokens after each prompt, up to and with the end."""
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
        stop = next((i for i, token in enumerate(answer) if token in ends), len(answer) - 1)
        answers.append(answer[: stop + 1])
    return answers
