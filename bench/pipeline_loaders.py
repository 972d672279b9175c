"""One job, done by the input pipelines that people use: as each one's documentation has it.

The job: conversations in JSON lines -> chat template -> token ids and loss mask -> rows of
LENGTH tokens, filled by best fit, with position and segment ids, nothing lost -> batches of BATCH
rows, epoch after epoch, without shuffling. DeltaServe and Grain have packers; the others are
given `pack`, which needs a list of rows at a time, as their batched maps have it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from deltaserve.bench.pipeline_text import Corpus
from deltaserve.pipeline.consumption import usable_cores

LENGTH, BATCH, ROWS = 1024, 8, 256
"""Tokens of a row, rows of a batch, and conversations that are tokenised and packed together."""
TOGETHER = 64
"""Conversations that Grain's maps get at a time; its packer then works piece by piece."""
Batch = Mapping[str, Any]
FIELDS = {"input_ids": np.int32, "loss_mask": np.uint8}
PACKED = (*FIELDS, "position_ids", "segment_ids")

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
        return self([list(messages) for messages in batch["messages"]])


def cut(ids: Sequence[int], mask: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A conversation in pieces of LENGTH tokens."""
    for at in range(0, len(ids), LENGTH):
        part = slice(at, at + LENGTH)
        yield np.asarray(ids[part], np.int32), np.asarray(mask[part], np.uint8)


def pack(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Packed rows of a list of rows."""
    from deltaserve.pipeline.packing import best_fit

    pairs = zip(batch["input_ids"], batch["loss_mask"], strict=True)
    pieces = [piece for ids, mask in pairs for piece in cut(ids, mask)]
    together = best_fit([len(ids) for ids, _ in pieces], LENGTH)
    out = {name: np.zeros((len(together), LENGTH), FIELDS.get(name, np.int32)) for name in PACKED}
    for row, members in enumerate(together):
        at = 0
        for number, (ids, mask) in enumerate((pieces[each] for each in members), 1):
            place = (row, slice(at, at + len(ids)))
            out["input_ids"][place], out["loss_mask"][place] = ids, mask
            out["position_ids"][place], out["segment_ids"][place] = np.arange(len(ids)), number
            at += len(ids)
    return out


def deltaserve(corpus: Corpus, workers: int, threads: int = 0) -> Iterator[Batch]:
    from deltaserve.pipeline import Plan, open_pipeline

    rows = Plan.from_jsonl(corpus.chats).chat_template(corpus.tokenizer).tokenize(corpus.tokenizer)
    plan = rows.repeat().pack(LENGTH).batch(BATCH)
    with open_pipeline(plan, threads=threads, processes=workers) as batches:
        yield from batches


def threaded(corpus: Corpus, workers: int) -> Iterator[Batch]:
    """The same with as many threads as cores, which the others' tokenizers start by themselves."""
    return deltaserve(corpus, workers, usable_cores())


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
                            rows = pack(encode(held))
                            held = []
                            for at in range(len(rows["input_ids"])):
                                yield {name: torch.from_numpy(rows[name][at]) for name in PACKED}

    yield from DataLoader(Packed(), batch_size=BATCH, num_workers=workers)


def streaming(corpus: Corpus, workers: int) -> Iterator[Batch]:
    """Hugging Face datasets, streamed and mapped in lists; its workers would be DataLoader's."""
    from datasets import load_dataset

    data = load_dataset("json", data_files=str(corpus.chats), split="train", streaming=True)
    data = data.map(
        Encode(corpus).rows, batched=True, batch_size=ROWS, remove_columns=["id", "messages"]
    )
    data = data.map(pack, batched=True, batch_size=ROWS).repeat(None).with_format("numpy")
    yield from data.iter(BATCH)


def grain(corpus: Corpus, workers: int) -> Iterator[Batch]:
    """Random access, lists of rows, Grain's own best-fit packer; threads, or processes that each
    pack their part and hand over whole batches (mp_prefetch last, as its documentation has it)."""
    import grain.python as pygrain
    from grain.experimental import BestFitPackIterDataset, FlatMapIterDataset, FlatMapTransform

    encode = Encode(corpus)
    lines = corpus.chats.read_text().splitlines()

    class Cut(FlatMapTransform):
        max_fan_out = 100_000

        def flat_map(self, made: Any) -> list[dict[str, np.ndarray]]:
            rows = zip(made["input_ids"], made["loss_mask"], strict=True)
            return [dict(zip(FIELDS, piece, strict=True)) for row in rows for piece in cut(*row)]

    def together(some: Sequence[str]) -> Any:
        return encode([json.loads(line)["messages"] for line in some])

    data = pygrain.MapDataset.source(lines).repeat(None).batch(TOGETHER, batch_fn=list)
    threads = 0 if workers else 1
    rows = data.map(together).to_iter_dataset(
        pygrain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    )
    packed = BestFitPackIterDataset(
        FlatMapIterDataset(rows, Cut()),
        length_struct=dict.fromkeys(FIELDS, LENGTH),
        num_packing_bins=128,
    ).batch(BATCH)
    if workers:
        packed = packed.mp_prefetch(pygrain.MultiprocessingOptions(num_workers=workers))
    for batch in packed:
        yield batch | {"segment_ids": batch["input_ids_segment_ids"]}


def ray_data(corpus: Corpus, workers: int) -> Iterator[Batch]:
    """Ray Data with its own settings; an epoch is one execution."""
    import ray

    encode = Encode(corpus)
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=40)
    ray.data.DataContext.get_current().enable_progress_bars = False
    while True:
        data = ray.data.read_json(str(corpus.chats), lines=True)
        data = data.map_batches(encode.rows, batch_size=ROWS).map_batches(pack, batch_size=ROWS)
        yield from data.iter_batches(batch_size=BATCH, drop_last=True)


LOADERS: dict[str, Callable[[Corpus, int], Iterator[Batch]]] = {
    "deltaserve": deltaserve,
    "threaded": threaded,
    "dataloader": dataloader,
    "grain": grain,
    "ray": ray_data,
    "streaming": streaming,
}


def filled(batch: Batch) -> tuple[int, int]:
    """Tokens of a batch, and its places."""
    segments = np.asarray(batch["segment_ids"])
    return int(np.count_nonzero(segments)), segments.size
