"""Several rows of tokens in one of a fixed length, without attention between them.

A packed row has, each of the row's length: ``input_ids``, ``position_ids`` (from 0 in each
document; attention kernels and transformers' masks start a new sequence there), ``segment_ids``
(1, 2, ... for the documents, 0 for padding), ``labels`` (-100 where no loss is taken: padding, a
document's first token, which nothing of its own predicts, and what its loss mask leaves out);
and ``seq_lengths``, the length of each document.

Best fit: the rows of a window, the longest first, each into the fullest packed row that it fits
(best-fit decreasing, as in Ding et al., "Fewer Truncations Improve Language Modeling", 2024).
First fit: in the order of arrival, into the first that it fits.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deltaserve.pipeline.rows import Row, RowError
from deltaserve.pipeline.streams import Stream, Windowed

IGNORED = -100


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which rows go together; each list in the order of arrival, lists by their first row."""
    free: list[tuple[int, int]] = []  # rising (free space, bin)
    bins: list[list[int]] = []
    for at in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        place = bisect_left(free, (lengths[at], -1))
        if place < len(free):
            space, number = free.pop(place)
        else:
            space, number = room, len(bins)
            bins.append([])
        bins[number].append(at)
        if space > lengths[at]:
            insort(free, (space - lengths[at], number))
    return sorted(sorted(each) for each in bins)


def first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """As best_fit, each row into the first that has space."""
    free = np.zeros(len(lengths), np.int64)
    bins: list[list[int]] = []
    for at, length in enumerate(lengths):
        fits = free[: len(bins)] >= length
        number = int(fits.argmax()) if fits.any() else len(bins)
        if number == len(bins):
            bins.append([])
            free[number] = room
        bins[number].append(at)
        free[number] -= length
    return bins


ALGORITHMS = {"best_fit": best_fit, "first_fit": first_fit}


class Pack(Windowed):
    """A window is as many rows as fill ``window`` packed rows."""

    def __init__(self, child: Stream, name: str, params: Mapping[str, Any]) -> None:
        super().__init__(child)
        self._name, self._room = name, params["length"]
        self._algorithm = ALGORITHMS[params["algorithm"]]
        self._overflow, self._pad = params["overflow"], params["pad_id"]
        self._tokens = params["window"] * self._room

    def _window(self) -> list[Row]:
        pieces: list[tuple[Row, np.ndarray, np.ndarray]] = []
        tokens = 0
        while tokens < self._tokens:
            try:
                row = self._child.next()
            except StopIteration:
                break
            found = self._pieces(row)
            tokens += sum(len(ids) for _, ids, _ in found)
            pieces += found
        together = self._algorithm([len(ids) for _, ids, _ in pieces], self._room)
        return [self._packed([pieces[at] for at in each]) for each in together]

    def _pieces(self, row: Row) -> list[tuple[Row, np.ndarray, np.ndarray]]:
        ids, labels = labelled(row, self._name)
        if len(ids) > self._room and self._overflow == "error":
            raise RowError(
                self._name,
                row.key,
                f"{len(ids)} tokens, more than {self._room}: filter such rows, or choose overflow "
                '"split" or "truncate"',
            )
        stop = self._room if self._overflow == "truncate" else len(ids)
        cuts = range(0, min(len(ids), stop), self._room)
        return [(row, ids[c : c + self._room], labels[c : c + self._room]) for c in cuts]

    def _packed(self, pieces: list[tuple[Row, np.ndarray, np.ndarray]]) -> Row:
        out = {
            "input_ids": np.full(self._room, self._pad, np.int32),
            "position_ids": np.zeros(self._room, np.int32),
            "segment_ids": np.zeros(self._room, np.int32),
            "labels": np.full(self._room, IGNORED, np.int32),
        }
        at = 0
        for number, (_, ids, labels) in enumerate(pieces, 1):
            end = at + len(ids)
            out["input_ids"][at:end] = ids
            out["position_ids"][at:end] = np.arange(len(ids))
            out["segment_ids"][at:end] = number
            out["labels"][at + 1 : end] = labels[1:]
            at = end
        # Padding is a sequence of its own, which no document sees.
        out["position_ids"][at:] = np.arange(self._room - at)
        out["seq_lengths"] = np.array([len(ids) for _, ids, _ in pieces], np.int32)
        return Row(pieces[0][0].key, out)


def labelled(row: Row, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a row, and its labels: the tokens, -100 where its loss mask is 0.

    Raises PipelineError: no tokens, or a mask of another length.
    """
    from deltaserve.pipeline.elements import field_of

    ids = np.asarray(field_of(row, "input_ids", name))
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
        raise RowError(name, row.key, "input_ids is not a list of token ids")
    mask = row.value.get("loss_mask")
    ids = ids.astype(np.int32, copy=False)
    if mask is None:
        return ids, ids
    mask = np.asarray(mask)
    if mask.shape != ids.shape:
        raise RowError(name, row.key, f"{len(ids)} tokens, but a loss mask for {len(mask)}")
    return ids, np.where(mask > 0, ids, np.int32(IGNORED))
