"""Samples as token ids for a Hugging Face model, in batches of like length.

B sequences of T token ids.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from deltaserve.errors import SelectionError
from deltaserve.select.pool import Sample

# Samples that are tokenised and sorted by length together.
WINDOW = 4096


@dataclass(frozen=True)
class ModelOptions:
    """How a model reads the pool.

    model: directory or hub id. max_length: tokens; longer samples are cut. batch_tokens: in one
    batch, padding included.
    """

    model: str
    max_length: int = 512
    batch_tokens: int = 8192
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.max_length < 2 or self.batch_tokens < 1:
            raise SelectionError("a model reads samples of 2 tokens or more, in batches of 1 up")


@dataclass(frozen=True)
class Tokens:
    """One sample; the first ``prompt`` tokens ask, the rest answers."""

    row: int
    ids: list[int]
    prompt: int


@dataclass(frozen=True)
class Batch:
    """rows [B]; ids_BT int64, padded on the right with 0; lengths_B and prompts_B int64."""

    rows: list[int]
    ids_BT: torch.Tensor
    lengths_B: torch.Tensor
    prompts_B: torch.Tensor

    def mask_BT(self) -> torch.Tensor:
        """True where a token stands."""
        places = torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device)
        return places < self.lengths_B[:, None]


def load_model(options: ModelOptions, *, head: bool) -> tuple[Any, Any]:
    """Model in eval mode (with its language-model head if asked for) and tokenizer.

    float32 on a CPU, the checkpoint's own dtype elsewhere. Raises SelectionError.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    kind: Any = AutoModelForCausalLM if head else AutoModel
    dtype: Any = torch.float32 if options.device == "cpu" else "auto"
    with quiet():
        try:
            model = kind.from_pretrained(options.model, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(options.model)
        except (OSError, ValueError, RuntimeError, KeyError) as cause:
            raise SelectionError(f"{options.model} cannot be loaded: {cause}") from None
    if not head and model.config.is_encoder_decoder:
        model = model.get_encoder()
    try:
        return model.to(options.device).eval(), tokenizer
    except (RuntimeError, AssertionError) as cause:
        raise SelectionError(f"device {options.device!r} cannot be used: {cause}") from None


def fitted(options: ModelOptions, model: Any, tokenizer: Any) -> ModelOptions:
    """Samples no longer than the model reads."""
    config = model.config.get_text_config()
    limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    lengths = [limit for limit in limits if limit is not None and limit > 1]
    return replace(options, max_length=min(options.max_length, *lengths))


def batches(samples: Iterable[Sample], tokenizer: Any, options: ModelOptions) -> Iterator[Batch]:
    """Every sample in some batch; a window's samples are sorted by length first."""
    numbered = enumerate(samples)
    while window := list(itertools.islice(numbered, WINDOW)):
        tokens = [tokenise(row, sample, tokenizer, options.max_length) for row, sample in window]
        tokens.sort(key=lambda t: len(t.ids))
        start = 0
        for stop in range(1, len(tokens) + 1):
            last = stop == len(tokens)
            if last or (stop + 1 - start) * len(tokens[stop].ids) > options.batch_tokens:
                yield _batch(tokens[start:stop], options.device)
                start = stop


def tokenise(row: int, sample: Sample, tokenizer: Any, limit: int) -> Tokens:
    """Messages go through the chat template where there is one; at least one token.

    A conversation's prompt ends where its last answer begins; a text has one token of prompt.
    """
    if sample.messages is None or not getattr(tokenizer, "chat_template", None):
        ids = list(tokenizer(sample.text, truncation=True, max_length=limit)["input_ids"])
        return Tokens(row, ids or [0], 1)
    messages = list(sample.messages)
    answered = messages[-1]["role"] == "assistant" and len(messages) > 1
    try:
        ids = _render(tokenizer, messages)
        prompt = len(_render(tokenizer, messages[:-1], add_generation_prompt=True))
    except Exception as cause:  # templates are programs and raise what they like
        raise SelectionError(f"sample {row}: the chat template refuses it: {cause}") from None
    return Tokens(row, ids[:limit] or [0], max(1, prompt) if answered else 1)


def _render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    if not messages:
        return []
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _batch(tokens: list[Tokens], device: str) -> Batch:
    lengths = [len(t.ids) for t in tokens]
    ids_BT = torch.zeros(len(tokens), max(lengths), dtype=torch.long)
    for at, each in enumerate(tokens):
        ids_BT[at, : lengths[at]] = torch.tensor(each.ids)
    return Batch(
        [t.row for t in tokens],
        ids_BT.to(device),
        torch.tensor(lengths, device=device),
        torch.tensor([t.prompt for t in tokens], device=device),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the notes and progress bars that transformers writes while it loads."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
