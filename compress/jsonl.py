"""Text and tasks from JSON Lines: {"text": ...} or {"messages": [...]} a line."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from deltaserve.compress.text import FileRef, Sample, Text
from deltaserve.errors import ConfigError


def read_text(
    path: Path, tokenizer: Any, *, samples: int, seq_len: int | None, context: int, seed: int
) -> Text:
    """Sequences from a JSONL file of {"text": ...} or {"messages": [...]}.

    At most ``samples`` lines, drawn by ``seed`` while the file is read once, a line at a time
    (algorithm R: Vitter, ACM TOMS 1985). Sequences are cut to ``seq_len`` tokens where it is
    given. Raises ConfigError naming the line for a wrong schema anywhere, and for a drawn
    sequence beyond ``context`` tokens.
    """
    _require(tokenizer, path)
    drawn: list[Sample] = []
    rng, seen = random.Random(seed), 0
    lines = _Lines(path)
    for where, entry in lines:
        place = rng.randrange(seen + 1)
        if len(drawn) == samples and place >= samples:
            seen += 1
            continue
        sample = _cut(_sample(entry, tokenizer, where), seq_len)
        if len(sample.tokens) > context:
            raise ConfigError(
                f"{where}: {len(sample.tokens)} tokens, but the model reads at most {context}; "
                "shorten it or cut with --seq-len"
            )
        # A single token predicts nothing that could be compared.
        if len(sample.tokens) > 1:
            seen += 1
            if len(drawn) < samples:
                drawn.append(sample)
            else:
                drawn[place] = sample
    if not drawn:
        raise ConfigError(
            f"{path} holds no text: give one JSON object with text or messages a line"
        )
    rng.shuffle(drawn)
    return Text(tuple(drawn), path.name, seed, lines.file)


def read_tasks(path: Path, tokenizer: Any, context: int) -> tuple[Sample, ...]:
    """Prompts with their right answers: messages of which the last is the assistant's.

    An answer ends with the token that ends a turn, which the model must write too. Raises
    ConfigError naming the line.
    """
    _require(tokenizer, path)
    ends = set(tokenizer.all_special_ids)
    found = []
    for where, entry in _Lines(path):
        if "messages" not in entry or entry["messages"][-1]["role"] != "assistant":
            raise ConfigError(f"{where}: needs messages that end with the assistant's right answer")
        sample = _sample(entry, tokenizer, where)
        if len(sample.tokens) > context:
            raise ConfigError(f"{where}: {len(sample.tokens)} tokens, the model reads {context}")
        stops = (i for i in range(sample.prompt, len(sample.tokens)) if sample.tokens[i] in ends)
        stop = next(stops, len(sample.tokens) - 1)
        found.append(Sample(sample.tokens[: stop + 1], sample.prompt))
    if not found:
        raise ConfigError(f"{path} holds no task: give one JSON object with messages a line")
    return tuple(found)


def _require(tokenizer: Any, path: Path) -> None:
    if tokenizer is None:
        raise ConfigError(f"{path} needs a tokenizer, and the model directory has none")


def _cut(sample: Sample, seq_len: int | None) -> Sample:
    if seq_len is None:
        return sample
    return Sample(sample.tokens[:seq_len], min(sample.prompt, seq_len - 1))


class _Lines:
    """Checked entries of a file, each after the words that name its line; blank lines are none.

    file: what was read, once all of it was.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.file: FileRef | None = None

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        digest, size = hashlib.sha256(), 0
        try:
            with self._path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    digest.update(line)
                    size += len(line)
                    if line.strip():
                        where = f"{self._path}, line {number}"
                        yield where, _entry(line, where)
        except OSError as cause:
            raise ConfigError(f"{self._path} cannot be read: {cause}") from None
        self.file = FileRef(f"sha256:{digest.hexdigest()}", size)


def _entry(line: bytes, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as cause:  # not UTF-8 is one, too
        raise ConfigError(f"{where}: not JSON: {cause}") from None
    text, messages = (
        entry.get(k) if isinstance(entry, dict) else None for k in ("text", "messages")
    )
    if isinstance(text, str) and messages is None:
        return {"text": text}
    if text is None and _is_chat(messages):
        return {"messages": messages}
    raise ConfigError(
        f'{where}: needs either "text", a string, or "messages", a list of objects with '
        '"role" and "content"'
    )


def _sample(entry: dict[str, Any], tokenizer: Any, where: str) -> Sample:
    if "text" in entry:
        tokens = tokenizer(entry["text"])["input_ids"]
        return Sample(tuple(tokens), max(1, len(tokens) // 4))
    return _chat_sample(entry["messages"], tokenizer, where)


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
