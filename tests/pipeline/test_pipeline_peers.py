"""The loaders that are compared do the same work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from deltaserve.bench.pipeline_loaders import LENGTH, LOADERS, Batch, Encode, cut, filled
from deltaserve.bench.pipeline_peers import PeerError, turn
from deltaserve.bench.pipeline_text import Corpus, write
from deltaserve.pipeline.sources import JsonLines


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write(tmp_path_factory.mktemp("corpus"), rows=300)


def documents(batch: Batch) -> Iterator[tuple[int, ...]]:
    """The tokens of each document of a batch."""
    for ids, segments in zip(
        np.asarray(batch["input_ids"]), np.asarray(batch["segment_ids"]), strict=True
    ):
        for number in range(1, int(segments.max()) + 1):
            yield tuple(ids[segments == number].tolist())


@pytest.mark.parametrize(
    "side", ["deltaserve:0", "threaded:0", "grain:0", "dataloader:0", "streaming:0"]
)
def test_all_give_the_same_documents(corpus: Corpus, side: str) -> None:
    """In three passes over the data each document comes, whole, and nothing else does."""
    messages = [row["messages"] for row in JsonLines((str(corpus.chats),)).read(range(300))]
    made = Encode(corpus)(messages)
    rows = zip(made["input_ids"], made["loss_mask"], strict=True)
    expected = {tuple(ids.tolist()) for row in rows for ids, _ in cut(*row)}
    enough = 3 * sum(map(len, made["input_ids"]))
    name, workers = side.split(":")
    batches: Any = LOADERS[name](corpus, int(workers))
    found: set[tuple[int, ...]] = set()
    tokens = 0
    while tokens < enough:
        batch = next(batches)
        assert np.asarray(batch["input_ids"]).shape == (8, LENGTH)
        here = list(documents(batch))
        assert filled(batch)[0] == sum(map(len, here))
        tokens += filled(batch)[0]
        found.update(here)
    batches.close()
    assert found == expected


def test_a_turn_measures_a_process_of_its_own(corpus: Corpus) -> None:
    found = turn("deltaserve:0", corpus.chats.parent, 0.3)
    assert found.tokens_per_s > 0
    assert 0.5 < found.fill <= 1
    assert 0 < found.cpu_s_per_million < 1e3


def test_a_loader_that_fails_is_named_with_what_it_said(corpus: Corpus) -> None:
    with pytest.raises(PeerError, match=r"ended with 1: KeyError: 'nobody'"):
        turn("nobody:0", corpus.chats.parent, 0.3)
