"""Batches, and rows of similar length for them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deltaserve.errors import PipelineError
from deltaserve.pipeline.elements import field_of
from deltaserve.pipeline.packing import IGNORED, labelled
from deltaserve.pipeline.rows import Row, RowError
from deltaserve.pipeline.streams import State, Stream, Windowed

# What fills a field of tokens behind a row's end; all others are filled with 0.
FILLS = {"labels": IGNORED}


class Bucket(Windowed):
    """Groups of ``n`` rows whose lengths lie between the same boundaries; what is left of a
    window goes into groups of neighbouring lengths, so that no row is held back."""

    def __init__(
        self, child: Stream, name: str, boundaries: Sequence[int], n: int, window: int
    ) -> None:
        super().__init__(child)
        self._name, self._boundaries, self._n, self._size = name, boundaries, n, n * window

    def _window(self) -> list[Row]:
        rows = self._take(lambda taken: len(taken) >= self._size)
        lengths = [len(field_of(row, "input_ids", self._name)) for row in rows]
        buckets: dict[int, list[int]] = {}
        for at, length in enumerate(lengths):
            buckets.setdefault(bisect_left(self._boundaries, length), []).append(at)
        groups, left = [], []
        for number in sorted(buckets):
            members = buckets[number]
            whole = len(members) - len(members) % self._n
            groups += [members[at : at + self._n] for at in range(0, whole, self._n)]
            left += members[whole:]
        left.sort(key=lambda at: (lengths[at], at))
        rest = [left[at : at + self._n] for at in range(0, len(left), self._n)]
        # A group that is not full would shift all that follow: it goes last.
        short = [rest.pop()] if rest and len(rest[-1]) < self._n else []
        order = sorted(groups + rest, key=min) + short
        return [rows[at] for group in order for at in group]


class Batch:
    """``n`` rows stacked into one."""

    def __init__(self, child: Stream, name: str, params: Mapping[str, Any]) -> None:
        self._child, self._name = child, name
        self._n, self._drop = params["n"], params["drop_remainder"]
        self._pad, self._pad_to = params["pad"], params["pad_to"]

    def next(self) -> Row:
        rows: list[Row] = []
        while len(rows) < self._n:
            try:
                rows.append(self._child.next())
            except StopIteration:
                if not rows or self._drop:
                    raise
                break
        if self._pad is not None:
            rows = [self._padded(row, self._length(rows)) for row in rows]
        return Row(rows[0].key, stacked(rows, self._name))

    def get_state(self) -> State:
        return self._child.get_state()

    def set_state(self, state: State) -> None:
        self._child.set_state(state)

    def close(self) -> None:
        self._child.close()

    def _length(self, rows: list[Row]) -> int:
        longest = max(len(field_of(row, "input_ids", self._name)) for row in rows)
        if self._pad_to is None:
            return longest
        if longest > self._pad_to:
            what = f"a row of its batch has {longest} tokens and does not fit pad_to={self._pad_to}"
            raise RowError(self._name, rows[0].key, what)
        return int(self._pad_to)

    def _padded(self, row: Row, length: int) -> Row:
        ids, labels = labelled(row, self._name)
        value = {"labels": labels} | {k: v for k, v in row.value.items() if k != "loss_mask"}
        value |= {"input_ids": ids, "attention_mask": np.ones(len(ids), np.uint8)}
        for name, each in value.items():
            if isinstance(each, np.ndarray) and each.shape == ids.shape:
                fill = self._pad if name == "input_ids" else FILLS.get(name, 0)
                value[name] = np.pad(each, (0, length - len(ids)), constant_values=fill)
        return Row(row.key, value)


def stacked(rows: Sequence[Row], name: str) -> dict[str, Any]:
    """One mapping of many: arrays [n, ...] of numbers of one shape, lists of all else.

    Raises PipelineError: rows with different fields, or tokens of different lengths.
    """
    fields = list(rows[0].value)
    for row in rows:
        if set(row.value) != set(fields):
            raise RowError(
                name,
                row.key,
                f"it has the fields {', '.join(row.value)}, and the first of its batch has "
                f"{', '.join(fields)}: give all rows the same with a map",
            )
    return {field: _stack([row.value[field] for row in rows], field, name) for field in fields}


def _stack(values: list[Any], field: str, name: str) -> Any:
    if field == "input_ids" and len({len(value) for value in values}) > 1:
        raise PipelineError(
            f"{name}: rows of different lengths: give pad=, the id that fills the shorter ones, "
            "or pack first"
        )
    if isinstance(values[0], np.ndarray):
        same = len({(v.shape, v.dtype) if isinstance(v, np.ndarray) else v for v in values}) == 1
        return np.stack(values) if same else values
    if isinstance(values[0], (bool, int, float)) and len({type(v) for v in values}) == 1:
        return np.array(values)
    return values
