"""What the tests of pipelines share: files of rows, a small tokenizer with a template, streams."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deltaserve.pipeline import Plan, open_pipeline
from deltaserve.pipeline.elements import register

WORDS = ["the", "a", "cat", "dog", "sees", "runs", "eats", "over", "house", "tree", "12", "red"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %} {{ eos_token }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def write_lines(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def texts(path: Path, count: int, seed: int = 0) -> str:
    """Rows {"id", "text"} of lognormal length."""
    draw = random.Random(seed)
    return write_lines(
        path,
        [
            {"id": f"{path.stem}-{n}", "text": words(draw, int(draw.lognormvariate(2.5, 1)) + 1)}
            for n in range(count)
        ],
    )


def chats(path: Path, count: int, seed: int = 0) -> str:
    """Rows {"messages"} of one to three turns."""
    draw = random.Random(seed)
    return write_lines(
        path, [{"messages": conversation(draw, draw.randint(1, 3))} for _ in range(count)]
    )


def conversation(draw: random.Random, turns: int) -> list[dict[str, str]]:
    roles = ("user", "assistant") * turns
    return [{"role": role, "content": words(draw, draw.randint(1, 12))} for role in roles]


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def tokenizer(folder: Path, *, template: str | None = TEMPLATE) -> str:
    """A word-level fast tokenizer, saved; every word of WORDS is a token."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {word: at for at, word in enumerate(special + WORDS)}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=special[4:],
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return str(folder)


def count_words(row: dict[str, Any]) -> dict[str, Any]:
    """The length of each word as a token: no tokenizer needed."""
    return {"input_ids": np.array([len(word) for word in row["text"].split()], np.int32)}


def long_enough(row: dict[str, Any]) -> bool:
    return len(row["text"]) > 30


def digest(element: Any) -> str:
    """A hash of all values of an element, with their types and shapes."""
    hashed = hashlib.sha256()
    for name in sorted(element):
        value = element[name]
        hashed.update(name.encode())
        for each in value if isinstance(value, list) else [value]:
            array = isinstance(each, np.ndarray)
            text = f"{each.dtype}{each.shape}{each.tolist()}" if array else repr(each)
            hashed.update(text.encode())
    return hashed.hexdigest()


def stream(plan: Plan, limit: int | None = None, **options: Any) -> list[str]:
    """The digests of a plan's elements."""
    found = []
    with open_pipeline(plan, **options) as elements:
        for element in elements:
            found.append(digest(element))
            if len(found) == limit:
                break
    return found


def values(plan: Plan, field: str, limit: int | None = None, **options: Any) -> list[Any]:
    found = []
    with open_pipeline(plan, **options) as elements:
        for element in elements:
            found.append(element[field])
            if len(found) == limit:
                break
    return found


@register("pipelines:tokens")
def tokens(row: dict[str, Any]) -> dict[str, Any]:
    """Rows of different sources, alike."""
    return {"input_ids": row["input_ids"]}
