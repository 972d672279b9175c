"""One job, done by the input pipelines that people use: as each one's documentation has it.

The job: conversations in JSON lines -> chat template -> token ids and loss mask -> rows of
LENGTH tokens -> batches of BATCH rows, epoch after epoch, without shuffling. Whoever has a
packer of its own uses it (DeltaServe, Grain); the others join and cut, as `group_texts` in
Hugging Face's examples does.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaserve.bench.pipeline_text import Corpus

LENGTH, BATCH, ROWS = 1024, 8, 64
"""Tokens of a row, rows of a batch, and conversations that are tokenised in one call."""
Batch = Mapping[str, Any]
FIELDS = {"input_ids": np.int32, "loss_mask": np.uint8}


_mine = threading.local()
_loading = threading.Lock()


def _tokenizer(path: str) -> Any:
    """This thread's own: one may not be used by two at a time."""
    if not hasattr(_mine, "tokenizer"):
        with _loading:
            from transformers import AutoTokenizer

            _mine.tokenizer = AutoTokenizer.from_pretrained(path)
    return _mine.tokenizer


class Encode:
    """Conversations -> {"input_ids": lists, "loss_mask": lists}; can be sent to processes."""

    def __init__(self, corpus: Corpus) -> None:
        self.path = str(corpus.tokenizer)

    def __call__(self, conversations: Sequence[Any]) -> dict[str, list[Any]]:
        made = _tokenizer(self.path).apply_chat_template(
            list(conversations), return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": made["input_ids"], "loss_mask": made["assistant_masks"]}

    def rows(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """For libraries that hand over columns."""
        chats = [
            [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
            for messages in batch["messages"]
        ]
        return self(chats)


def join(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All rows of a list end to end, cut every LENGTH; the rest of the list is dropped."""
    whole = {name: np.concatenate([np.asarray(r) for r in batch[name]]) for name in FIELDS}
    rows = len(whole["input_ids"]) // LENGTH
    return {
        name: whole[name][: rows * LENGTH].reshape(rows, LENGTH).astype(kind)
        for name, kind in FIELDS.items()
    }


def dataloader(corpus: Corpus, workers: int) -> Iterator[Batch]:
    """An IterableDataset that its workers share out by line, as PyTorch's documentation has it."""
    import torch
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    encode = Encode(corpus)

    class Packed(IterableDataset):
        def __iter__(self) -> Iterator[Batch]:
            worker = get_worker_info()
            first, step = (worker.id, worker.num_workers) if worker else (0, 1)
            held: list[Any] = []
            while True:
                with open(corpus.chats) as file:
                    for number, line in enumerate(file):
                        if number % step == first:
                            held.append(json.loads(line)["messages"])
                        if len(held) == ROWS:
                            rows = join(encode(held))
                            held = []
                            for at in range(len(rows["input_ids"])):
                                yield {name: torch.from_numpy(rows[name][at]) for name in FIELDS}

    yield from DataLoader(Packed(), batch_size=BATCH, num_workers=workers)


def streaming(corpus: Corpus, workers: int) -> Iterator[Batch]:
    """Hugging Face datasets, streamed and mapped in lists."""
    from datasets import load_dataset

    data = load_dataset("json", data_files=str(corpus.chats), split="train", streaming=True)
    data = data.map(
        Encode(corpus).rows, batched=True, batch_size=ROWS, remove_columns=["id", "messages"]
    )
    data = data.map(join, batched=True, batch_size=ROWS).repeat(None).with_format("numpy")
    yield from data.iter(BATCH)


def grain(corpus: Corpus, workers: int) -> Iterator[Batch]:
    """Random access, threads (or processes), Grain's own best-fit packer."""
    import grain.python as pygrain
    from grain.experimental import BestFitPackIterDataset

    encode = Encode(corpus)
    lines = corpus.chats.read_text().splitlines()

    def one(line: str) -> dict[str, np.ndarray]:
        made = encode([json.loads(line)["messages"]])
        return {name: np.asarray(made[name][0][:LENGTH], kind) for name, kind in FIELDS.items()}

    data = pygrain.MapDataset.source(lines).repeat(None).map(one)
    rows = data.to_iter_dataset(pygrain.ReadOptions(num_threads=2, prefetch_buffer_size=128))
    if workers:
        rows = rows.mp_prefetch(pygrain.MultiprocessingOptions(num_workers=workers))
    packed = BestFitPackIterDataset(
        rows, length_struct=dict.fromkeys(FIELDS, LENGTH), num_packing_bins=128
    )
    yield from packed.batch(BATCH)


def ray_data(corpus: Corpus, workers: int) -> Iterator[Batch]:
    """Ray Data with its own settings; an epoch is one execution."""
    import ray

    encode = Encode(corpus)
    ray.init(num_cpus=workers or 1, include_dashboard=False, log_to_driver=False, logging_level=40)
    ray.data.DataContext.get_current().enable_progress_bars = False
    while True:
        data = ray.data.read_json(str(corpus.chats), lines=True)
        data = data.map_batches(encode.rows, batch_size=ROWS)
        data = data.map_batches(join, batch_size=ROWS)
        yield from data.iter_batches(batch_size=BATCH, drop_last=True)


PEERS: dict[str, Callable[[Corpus, int], Iterator[Batch]]] = {
    "dataloader": dataloader,
    "grain": grain,
    "ray": ray_data,
    "streaming": streaming,
}


def tokens(batch: Batch) -> int:
    """Of a batch, without padding."""
    ids = np.asarray(batch["input_ids"])
    return int(np.count_nonzero(ids))


def corpus_in(folder: Path) -> Corpus:
    names = ("chats.jsonl", "pairs.jsonl", "texts.parquet", "tokenizer")
    chats, pairs, parquet, tokenizer = (folder / name for name in names)
    with open(chats) as file:
        return Corpus(chats, pairs, parquet, tokenizer, sum(1 for _ in file))
