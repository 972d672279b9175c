"""Text and tasks from JSON Lines: {"text": ...} or {"messages": [...]} a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeGuard

import torch

from deltaserve.compress.text import Sample, Text
from deltaserve.errors import ConfigError


def read_text(
    path: Path, tokenizer: Any, *, samples: int, seq_len: int | None, context: int, seed: int
) -> Text:
    """Sequences from a JSONL file of {"text": ...} or {"messages": [...]}.

    At most ``samples`` lines, drawn by ``seed`` if there are more. Sequences are cut to
    ``seq_len`` tokens where it is given. Raises ConfigError naming the line for a wrong
    schema and for a sequence beyond ``context`` tokens.
    """
    if tokenizer is None:
        raise ConfigError(f"{path} needs a tokenizer, and the model directory has none")
    found = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        sample = _sample(line, tokenizer, f"{path}, line {number}")
        if seq_len is not None:
            sample = Sample(sample.tokens[:seq_len], min(sample.prompt, seq_len - 1))
        if len(sample.tokens) > context:
            raise ConfigError(
                f"{path}, line {number}: {len(sample.tokens)} tokens, but the model reads at most "
                f"{context}; shorten it or cut with --seq-len"
            )
        # A single token predicts nothing that could be compared.
        if len(sample.tokens) > 1:
            found.append(sample)
    if not found:
        raise ConfigError(
            f"{path} holds no text: give one JSON object with text or messages a line"
        )
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return Text(tuple(found[i] for i in order[:samples].tolist()), path.name, seed)


def read_tasks(path: Path, tokenizer: Any, context: int) -> tuple[Sample, ...]:
    """Prompts with their right answers: messages of which the last is the assistant's.

    An answer ends with the token that ends a turn, which the model must write too. Raises
    ConfigError naming the line.
    """
    if tokenizer is None:
        raise ConfigError(f"{path} needs a tokenizer, and the model directory has none")
    ends = set(tokenizer.all_special_ids)
    found = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        sample = _sample(line, tokenizer, where)
        messages = json.loads(line).get("messages")
        if messages is None or messages[-1]["role"] != "assistant":
            raise ConfigError(f"{where}: needs messages that end with the assistant's right answer")
        if len(sample.tokens) > context:
            raise ConfigError(f"{where}: {len(sample.tokens)} tokens, the model reads {context}")
        stops = (i for i in range(sample.prompt, len(sample.tokens)) if sample.tokens[i] in ends)
        stop = next(stops, len(sample.tokens) - 1)
        found.append(Sample(sample.tokens[: stop + 1], sample.prompt))
    if not found:
        raise ConfigError(f"{path} holds no task: give one JSON object with messages a line")
    return tuple(found)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"{path} cannot be read: {cause}") from None


def _sample(line: str, tokenizer: Any, where: str) -> Sample:
    try:
        entry = json.loads(line)
    except ValueError as cause:
        raise ConfigError(f"{where}: not JSON: {cause}") from None
    text, messages = (
        entry.get(k) if isinstance(entry, dict) else None for k in ("text", "messages")
    )
    if isinstance(text, str) and messages is None:
        tokens = tokenizer(text)["input_ids"]
        return Sample(tuple(tokens), max(1, len(tokens) // 4))
    if text is None and _is_chat(messages):
        return _chat_sample(messages, tokenizer, where)
    raise ConfigError(
        f'{where}: needs either "text", a string, or "messages", a list of objects with '
        '"role" and "content"'
    )


def _is_chat(messages: Any) -> TypeGuard[list[dict[str, str]]]:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
            for m in messages
        )
    )


def _chat_sample(messages: list[dict[str, str]], tokenizer: Any, where: str) -> Sample:
    """The whole conversation; what stands before the last answer is the prompt."""
    if not tokenizer.chat_template:
        raise ConfigError(f"{where}: messages, but the model has no chat template; give text")
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    try:
        whole = _render(tokenizer, messages)
        prompt = _render(tokenizer, asked, add_generation_prompt=True) if asked else whole[:1]
    except Exception as cause:  # templates are programs and raise what they like
        raise ConfigError(f"{where}: the chat template refuses it: {cause}") from None
    return Sample(tuple(whole), max(1, min(len(prompt), len(whole) - 1)))


def _render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
