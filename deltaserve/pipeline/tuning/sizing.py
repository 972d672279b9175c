"""How large caches would be: a sample of rows, written as a cache writes them.

What the sample takes is scaled by its share of the source. In files of lines that share is known
in bytes, which follow the size of rows far more closely than their number does.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from deltaserve.pipeline.rows import Key, Row
from deltaserve.pipeline.shards import ENCODER, records_of
from deltaserve.pipeline.sources import Source

LISTS, SIZE = 64, 16
"""Sampled lists at most, and rows of each: spread over the source."""
LEAST = 8
OFFSET = 8
"""Bytes that a file of rows takes for each, beside the row."""
Call = Callable[[list[Row]], list[Row]]


def sample(source: Source, lists: int = LISTS) -> list[list[int]]:
    """Row numbers, neighbours in a list as a reader has them."""
    rows = len(source)
    starts = dict.fromkeys(at * max(0, rows - SIZE) // lists for at in range(lists))
    return [list(range(start, min(start + SIZE, rows))) for start in starts if rows]


def rows_at(source: Source, numbers: Sequence[int]) -> list[Row]:
    pairs = zip(numbers, source.read(numbers), strict=True)
    return [Row((0, 0, number), value) for number, value in pairs if value is not None]


def kept_bytes(
    source: Source, name: str, calls: Sequence[tuple[str, Call]], seconds: float
) -> dict[str, float]:
    """Of a cache behind the source (called ``name``) and behind each operator, after one pass
    over all rows; infinite where a row holds what a cache cannot keep. calls: the operators, in
    order. It takes ``seconds``, or as long as a few lists need.

    Raises PipelineError: what the operators raise.
    """
    lists = sample(source)
    random.Random(0).shuffle(lists)
    found: dict[str, float] = dict.fromkeys((name, *(each for each, _ in calls)), 0.0)
    seen: dict[int, None] = {}
    end = time.perf_counter() + seconds
    for done, numbers in enumerate(lists):
        if done >= LEAST and time.perf_counter() > end:
            break
        # Lists of a small source overlap.
        fresh = [number for number in numbers if number not in seen]
        seen.update(dict.fromkeys(fresh))
        keys: list[Key] = [(0, 0, number) for number in fresh]
        rows = rows_at(source, fresh)
        found[name] += _written(keys, rows)
        for each, call in calls:
            rows = call(rows)
            found[each] += _written(keys, rows)
    scale = source.weight() / source.weight(list(seen)) if seen else 0.0
    return {each: scale * size for each, size in found.items()}


def _written(keys: Sequence[Key], rows: Sequence[Row]) -> float:
    try:
        records: Any = records_of(keys, rows, ())
        return sum(len(ENCODER.encode(record)) + OFFSET for record in records)
    except (TypeError, OverflowError):
        return float("inf")
