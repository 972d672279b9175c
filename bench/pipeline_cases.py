"""Six plans over real text that want different settings.

chat      JSON lines -> chat template -> tokens with loss mask -> best-fit packing
parquet   Parquet with zstd -> tokens -> padded batches
remote    rows that a store gives after 6 ms -> tokens -> packing
filter    JSON lines -> a compressibility filter that drops most -> chat template -> packing
pairs     preference pairs, scored by a service in 3 ms -> both answers tokenised -> batches
mix       remote rows that a filter thins, and pure Python cleaning: two segments, mixed
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaserve.bench.pipeline_text import Corpus
from deltaserve.pipeline.plan import Plan
from deltaserve.pipeline.tokenizers import tokenizer_of

LENGTH = 1024
# Few rows are arranged together, so that short measurements see many windows.
WINDOW = 32


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[Corpus], Plan]


def fetched(row: dict[str, Any]) -> dict[str, Any]:
    time.sleep(0.006)
    return row


def compressible(row: dict[str, Any]) -> bool:
    """Text that says something, and says it once: a tenth to a third of all."""
    text = row["messages"][-1]["content"].encode()
    return 0.3 < len(zlib.compress(text, 9)) / len(text) < 0.45


def spoken(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": "".join(message["content"] for message in row["messages"])}


def scored(row: dict[str, Any]) -> dict[str, Any]:
    time.sleep(0.003)
    return row | {"score": float(len(row["chosen"]) > len(row["rejected"]))}


class Both:
    """Chosen and rejected answer, each after the prompt, as one row of tokens."""

    def __init__(self, tokenizer: str) -> None:
        self.tokenizer = tokenizer

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        texts = [row["prompt"] + row[answer] for answer in ("chosen", "rejected")]
        ids = tokenizer_of(self.tokenizer)(texts, truncation=True, max_length=LENGTH)["input_ids"]
        return {"input_ids": np.concatenate([np.asarray(each, np.int32) for each in ids])}


def cleaned(row: dict[str, Any]) -> dict[str, Any]:
    """Character by character: all of it with the interpreter's lock."""
    return {
        "text": "".join(c for c in row["text"] if c.isascii() and (c.isprintable() or c == "\n"))
    }


def _chat(corpus: Corpus) -> Plan:
    rows = Plan.from_jsonl(corpus.chats).chat_template(corpus.tokenizer).tokenize(corpus.tokenizer)
    return _packed(rows.shuffle(seed=1))


def _parquet(corpus: Corpus) -> Plan:
    rows = Plan.from_parquet(corpus.parquet).tokenize(corpus.tokenizer, max_length=LENGTH)
    return rows.repeat().batch(8, pad=0)


def _remote(corpus: Corpus) -> Plan:
    rows = Plan.from_parquet(corpus.parquet).map(fetched, name="fetched")
    return _packed(rows.tokenize(corpus.tokenizer))


def _filter(corpus: Corpus) -> Plan:
    rows = Plan.from_jsonl(corpus.chats).filter(compressible, name="compressible")
    return _packed(rows.chat_template(corpus.tokenizer).tokenize(corpus.tokenizer))


def _pairs(corpus: Corpus) -> Plan:
    rows = Plan.from_jsonl(corpus.pairs).map(scored, name="scored")
    both = Both(str(corpus.tokenizer))
    return rows.map(both, name="both").repeat().batch(8, pad=0)


def _mix(corpus: Corpus) -> Plan:
    remote = (
        Plan.from_jsonl(corpus.chats)
        .map(fetched, name="fetched")
        .filter(compressible, name="compressible")
        .map(spoken, name="spoken")
        .tokenize(corpus.tokenizer, name="tokenize-remote")
    )
    local = Plan.from_parquet(corpus.parquet).map(cleaned, name="cleaned")
    local = local.tokenize(corpus.tokenizer, name="tokenize-local")
    parts = {remote.repeat(): 1.0, local.repeat(): 3.0}
    return Plan.mix(parts, seed=2).pack(LENGTH, window=WINDOW).batch(4)


def _packed(rows: Plan) -> Plan:
    return rows.repeat().pack(LENGTH, window=WINDOW).batch(4)


CASES = (
    Case("chat", _chat),
    Case("parquet", _parquet),
    Case("remote", _remote),
    Case("filter", _filter),
    Case("pairs", _pairs),
    Case("mix", _mix),
)
