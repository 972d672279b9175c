"""Six pipelines over real formats and tools, as plain functions in two parallel stages each.

jsonl_chat   JSON lines -> chat template -> Hugging Face tokeniser -> packed rows
parquet      Parquet with zstd, row groups -> tokeniser -> batches
remote       a store that answers after 8 ms -> parse -> batches
filter       JSON lines -> quality filter that keeps a tenth -> tokeniser -> batches
dpo          pairs of answers fetched from two stores -> both tokenised -> padded batches
gil          pure Python cleaning (holds the lock) -> hashing of large blocks (does not)
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import random
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deltaserve.bench.pipeline_stages import DROPPED, Step

ROWS = 2000
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"


@dataclass(frozen=True)
class Case:
    name: str
    source: Callable[[], Iterator[Any]]
    steps: tuple[Step, ...]

    def parallel(self) -> list[str]:
        return [step.name for step in self.steps if not step.serial]


class Data:
    """Files of random conversations, and a tokeniser trained on them."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.jsonl, self.parquet = folder / "chats.jsonl", folder / "texts.parquet"
        rng = random.Random(seed)
        words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(2000)]
        weights = [1 / (i + 1) for i in range(len(words))]
        self.texts = [
            " ".join(rng.choices(words, weights, k=int(min(600, rng.lognormvariate(4.3, 0.8)))))
            for _ in range(ROWS)
        ]
        with open(self.jsonl, "w") as out:
            for text in self.texts:
                half = len(text) // 2
                messages = [
                    {"role": "user", "content": text[:half]},
                    {"role": "assistant", "content": text[half:]},
                ]
                out.write(json.dumps({"messages": messages}) + "\n")
        self._write_parquet()
        self._tokenizer = self._train()
        self._copies = threading.local()

    def _write_parquet(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({"text": self.texts})
        pq.write_table(table, self.parquet, compression="zstd", row_group_size=50)

    def _train(self) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        special = ["<pad>", "<|user|>", "<|assistant|>", "<|end|>"]
        trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(self.texts[:300], trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", chat_template=TEMPLATE
        )

    def tokenizer(self) -> Any:
        """This thread's copy."""
        if not hasattr(self._copies, "mine"):
            self._copies.mine = copy.deepcopy(self._tokenizer)
        return self._copies.mine

    def lines(self) -> Iterator[str]:
        while True:
            with open(self.jsonl) as file:
                yield from file

    def tokenise(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer()(text, verbose=False)["input_ids"], np.int32)


def cases(data: Data) -> list[Case]:
    return [_chat(data), _parquet(data), _remote(data), _filter(data), _dpo(data), _gil(data)]


def _chat(data: Data) -> Case:
    def template(line: str) -> str:
        messages = json.loads(line)["messages"]
        return str(data.tokenizer().apply_chat_template(messages, tokenize=False))

    steps = (Step("template", template), Step("tokenise", data.tokenise), _serial("pack", pack))
    return Case("jsonl_chat", data.lines, steps)


def _parquet(data: Data) -> Case:
    import pyarrow.parquet as pq

    groups = pq.ParquetFile(data.parquet).num_row_groups

    def read(group: int) -> list[str]:
        time.sleep(0.004)  # a network disk's seek
        with pq.ParquetFile(data.parquet) as file:
            return list(file.read_row_group(group, use_threads=False)["text"].to_pylist()[:10])

    def tokenise(texts: list[str]) -> list[np.ndarray]:
        return [np.asarray(ids, np.int32) for ids in data.tokenizer()(texts)["input_ids"]]

    steps = (Step("read", read), Step("tokenise", tokenise), _serial("batch", batch, n=2))
    return Case("parquet", lambda: itertools.cycle(range(groups)), steps)


def _remote(data: Data) -> Case:
    def fetch(row: int) -> str:
        time.sleep(0.008)
        return data.texts[row]

    steps = (Step("fetch", fetch), Step("tokenise", data.tokenise), _serial("batch", batch))
    return Case("remote", lambda: itertools.cycle(range(ROWS)), steps)


def _filter(data: Data) -> Case:
    def good(line: str) -> Any:
        text = line[30:]
        ratio = len(zlib.compress(text.encode(), 9)) / len(text)
        return text if zlib.crc32(text.encode()) % 10 == 0 and ratio < 1 else DROPPED

    steps = (Step("good", good), Step("tokenise", data.tokenise), _serial("batch", batch, n=4))
    return Case("filter", data.lines, steps)


def _dpo(data: Data) -> Case:
    def fetch(row: int) -> tuple[str, str]:
        time.sleep(0.005)
        return data.texts[row], data.texts[row - 1]

    def both(pair: tuple[str, str]) -> list[np.ndarray]:
        time.sleep(0.002)  # the reference model's scores, from another service
        return [data.tokenise(text) for text in pair]

    steps = (Step("fetch", fetch), Step("both", both), _serial("pad", pad))
    return Case("dpo", lambda: itertools.cycle(range(ROWS)), steps)


def _gil(data: Data) -> Case:
    def clean(row: int) -> str:
        return "".join(c for c in data.texts[row] if c.isalnum() or c == " ")

    def digest(text: str) -> tuple[str, str]:
        return text, hashlib.sha256(text.encode() * 400).hexdigest()

    steps = (Step("clean", clean), Step("digest", digest), _serial("batch", batch))
    return Case("gil", lambda: itertools.cycle(range(ROWS)), steps)


def _serial(name: str, work: Callable[..., Iterator[Any]], **options: Any) -> Step:
    return Step(name, partial(work, **options), serial=True)


def pack(rows: Iterator[np.ndarray], length: int = 1024) -> Iterator[np.ndarray]:
    """Next fit: enough to be a serial tail."""
    held: list[np.ndarray] = []
    size = 0
    for row in rows:
        row = row[:length]
        if size + len(row) > length:
            yield np.concatenate([*held, np.zeros(length - size, np.int32)])
            held, size = [], 0
        held.append(row)
        size += len(row)


def batch(rows: Iterator[Any], n: int = 8) -> Iterator[list[Any]]:
    while held := list(itertools.islice(rows, n)):
        yield held


def pad(rows: Iterator[list[np.ndarray]], n: int = 4) -> Iterator[np.ndarray]:
    for pairs in batch(rows, n):
        flat = [ids for pair in pairs for ids in pair]
        out = np.zeros((len(flat), max(map(len, flat))), np.int32)
        for row, ids in zip(out, flat, strict=True):
            row[: len(ids)] = ids
        yield out
