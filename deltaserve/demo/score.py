"""Reference scoring: greedy decoding by transformers, exact match."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deltaserve.demo.tasks import Example
from deltaserve.demo.tokenizer import render


def score_texts(answers: Sequence[str], completions: Sequence[str]) -> float:
    """The share of completions that equal their answer, 0 to 1.

    Surrounding white space is ignored, nothing else.

    Raises:
        ValueError: no answers, or the two differ in length.
    """
    if not answers or len(answers) != len(completions):
        raise ValueError(
            f"cannot score {len(completions)} completions against {len(answers)} answers; "
            "give one completion for each of at least one answer"
        )
    right = sum(
        answer.strip() == text.strip() for answer, text in zip(answers, completions, strict=True)
    )
    return right / len(answers)


@torch.inference_mode()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
) -> list[str]:
    """Greedy answers to user prompts, each put into the tokenizer's chat template.

    Special tokens are left out of the answers; decoding stops at <eos> or after
    `max_new_tokens`.  The model's mode is restored afterwards.
    """
    was_training = model.training
    model.eval()
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        chats = [render(tokenizer, prompt) for prompt in prompts[start : start + batch_size]]
        batch = tokenizer(
            chats, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        ).to(model.device)
        out_BT = model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new_BT = out_BT[:, batch["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(new_BT, skip_special_tokens=True)
    model.train(was_training)
    return texts


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    batch_size: int = 64,
) -> float:
    """The share of examples that the model answers exactly, 0 to 1."""
    answers = [example.answer for example in examples]
    completions = complete(
        model,
        tokenizer,
        [example.prompt for example in examples],
        # One token per character at most, and the end; one more shows a run-on.
        max_new_tokens=max(map(len, answers)) + 2,
        batch_size=batch_size,
    )
    return score_texts(answers, completions)
