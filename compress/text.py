"""Text to calibrate and verify on: a JSONL file, or what the fine-tune itself says.

B sequences of T token ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from deltaserve.artifact.quality import TextRef
from deltaserve.errors import ConfigError

SAMPLED = "sampled from the fine-tune"
BATCH = 16
# Stands for a user's words when a chat template is cut open just before them.
MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Sample:
    """One sequence of token ids; the first ``prompt`` of them ask, the rest answers."""

    tokens: tuple[int, ...]
    prompt: int


@dataclass(frozen=True)
class Text:
    """Sequences and where they came from."""

    samples: tuple[Sample, ...]
    source: str
    seed: int

    def ref(self) -> TextRef:
        """What a manifest says about this text."""
        lines = "".join(f"{' '.join(map(str, s.tokens))}\n" for s in self.samples)
        digest = "sha256:" + hashlib.sha256(lines.encode()).hexdigest()
        tokens = sum(len(s.tokens) for s in self.samples)
        return TextRef(self.source, digest, len(self.samples), tokens, self.seed)

    def split(self, held_out: int) -> tuple[Text, Text]:
        """The text without every ``held_out``-th sequence, and those; one sequence is both."""
        if len(self.samples) < held_out:
            return self, self
        kept = tuple(s for i, s in enumerate(self.samples, 1) if i % held_out)
        return (
            Text(kept, self.source, self.seed),
            Text(self.samples[held_out - 1 :: held_out], self.source, self.seed),
        )


def batches(
    samples: Sequence[Sample], size: int = BATCH
) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Token ids [B, T], padded on the right with 0, and their lengths; short ones together.

    Under causal attention what stands to the right of a token does not change it.
    """
    ordered = sorted(samples, key=lambda s: len(s.tokens))
    for start in range(0, len(ordered), size):
        some = ordered[start : start + size]
        lengths = [len(s.tokens) for s in some]
        ids_BT = torch.zeros(len(some), max(lengths), dtype=torch.long)
        for row, sample in enumerate(some):
            ids_BT[row, : lengths[row]] = torch.tensor(sample.tokens)
        yield ids_BT, lengths


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
