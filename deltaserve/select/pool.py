"""A pool of samples: what is known of each stays in memory, the samples stay on disk.

About 30 bytes a sample: a content hash, an occurrence number, a length, and the columns asked
for. Texts are streamed again by each step that reads them.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaserve.errors import SelectionError
from deltaserve.select.extras import load_extra
from deltaserve.select.formats import Record, Source, open_sources

# What is being done, how much of it is done, how much there is (0: unknown).
Progress = Callable[[str, int, int], None]
Message = dict[str, str]
REPORT_EVERY = 1024
ID_BLOCK = 1 << 16


def no_progress(phase: str, done: int, total: int) -> None:
    """For those who do not want to know."""


@dataclass(frozen=True)
class Columns:
    """Which columns of the pool mean what; None: not read.

    ``text`` or ``messages`` (a list of {"role", "content"}) is what a sample says; ``id`` is
    used where the first sample has it. ``label`` and ``source`` group samples, ``tokens`` is
    their cost under a token budget, ``utility`` a number of the user's.
    """

    text: str = "text"
    messages: str = "messages"
    id: str = "id"
    label: str | None = None
    source: str | None = None
    tokens: str | None = None
    utility: str | None = None

    def names(self) -> list[str]:
        optional = (self.label, self.source, self.tokens, self.utility)
        return [self.text, self.messages, self.id, *(name for name in optional if name)]


@dataclass(frozen=True)
class Sample:
    """What one sample says: a text, or the messages of a conversation."""

    text: str
    messages: tuple[Message, ...] | None = None


@dataclass(frozen=True)
class Groups:
    """A column of few distinct values: ``codes`` int32 [n] into ``names``."""

    codes: np.ndarray
    names: tuple[str, ...]


class Pool:
    """Samples of one or several files.

    Attributes, all [n]:
        contents: uint64 hash of each text; equal texts, equal hashes.
        lengths: int32 characters.
        labels, sources: Groups; sources are the files where no column is named.
        tokens, utility: int64, float64, or None where no column is named.
        digest: of ids, contents and these columns.
    """

    def __init__(
        self, pool: Any, columns: Columns | None = None, progress: Progress = no_progress
    ) -> None:
        """``pool``: see `formats.open_sources`. Raises SelectionError naming file and line for a
        sample without text, for a missing or wrong value, and for an id that occurs twice."""
        self.columns = columns or Columns()
        self.inputs: Sequence[Source] = open_sources(pool)
        gathered = _Gathered(self.columns)
        for number, source in enumerate(self.inputs):
            for where, record in source.records(self.columns.names()):
                gathered.add(number, where, record)
                if len(gathered.contents) % REPORT_EVERY == 0:
                    progress("reading", len(gathered.contents), 0)
        if not gathered.contents:
            names = ", ".join(source.name for source in self.inputs)
            raise SelectionError(f"{names}: the pool is empty")
        self.contents = np.array(gathered.contents)
        self.lengths = np.array(gathered.lengths)
        self.labels = gathered.labels.groups() if self.columns.label else None
        self.sources = (
            gathered.sources.groups()
            if self.columns.source
            else Groups(np.array(gathered.inputs), tuple(s.name for s in self.inputs))
        )
        self.tokens = np.array(gathered.tokens) if self.columns.tokens else None
        self.utility = np.array(gathered.utility) if self.columns.utility else None
        self._given = gathered.given_ids()
        if self._given is None:
            self._occurrence = occurrences(self.contents)
        else:
            self._refuse_duplicate_ids()
        self.digest = self._digest()

    def __len__(self) -> int:
        return len(self.contents)

    def samples(self) -> Iterator[Sample]:
        """Every sample in order, read again from the disk."""
        columns = (self.columns.text, self.columns.messages)
        for source in self.inputs:
            for where, record in source.records(columns):
                yield read_sample(record, self.columns, where)

    def ids(self, rows: np.ndarray | None = None) -> list[str]:
        """The ids of ``rows``, or of all.

        Without an id column they come from the contents, so that a sample keeps its id in
        whatever file and place it stands; the second sample of a text gets "-2", and so on.
        """
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows)
        if self._given is not None:
            return [str(each) for each in self._given.take(chosen).to_pylist()]
        numbers = self._occurrence[chosen]
        return [
            f"{content:016x}" + (f"-{number + 1}" if number else "")
            for content, number in zip(self.contents[chosen], numbers, strict=True)
        ]

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """The rows of ``ids``. Raises SelectionError naming one that the pool lacks."""
        wanted = set(ids)
        names = (name for block in self._id_blocks() for name in block)
        found = {name: row for row, name in enumerate(names) if name in wanted}
        for name in ids:
            if name not in found:
                raise SelectionError(f"the pool has no sample with the id {name!r}")
        return np.array([found[name] for name in ids], dtype=np.int64)

    def _id_blocks(self) -> Iterator[list[str]]:
        for start in range(0, len(self), ID_BLOCK):
            yield self.ids(np.arange(start, min(start + ID_BLOCK, len(self))))

    def where(self, row: int) -> str:
        """File and line of a row; reads the pool up to it."""
        records = (where for s in self.inputs for where, _ in s.records(self.columns.names()))
        return next(where for number, where in enumerate(records) if number == row)

    def _refuse_duplicate_ids(self) -> None:
        coded = self._given.dictionary_encode()
        if len(coded.dictionary) == len(self):
            return
        codes = coded.indices.to_numpy()
        twice = int(np.flatnonzero(np.bincount(codes) > 1)[0])
        first, second = np.flatnonzero(codes == twice)[:2]
        raise SelectionError(
            f"the id {coded.dictionary[twice].as_py()!r} occurs twice: {self.where(first)} and "
            f"{self.where(second)}; ids must be unique"
        )

    def _digest(self) -> str:
        hashed = hashlib.sha256(self.contents.tobytes())
        for block in self._id_blocks():
            hashed.update(("\n".join(block) + "\n").encode("utf-8", "surrogatepass"))
        for groups in (self.labels, self.sources if self.columns.source else None):
            if groups is not None:
                hashed.update(groups.codes.tobytes() + "\n".join(groups.names).encode())
        for column in (self.tokens, self.utility):
            if column is not None:
                hashed.update(column.tobytes())
        return f"sha256:{hashed.hexdigest()}"


def read_sample(record: Record, columns: Columns, where: str) -> Sample:
    """The text or the messages of a record. Raises SelectionError."""
    text, messages = record.get(columns.text), record.get(columns.messages)
    if isinstance(text, str) and messages is None:
        return Sample(text)
    if messages is not None and text is None:
        turns = tuple(_message(each, where) for each in _listed(messages, columns, where))
        return Sample("\n".join(turn["content"] for turn in turns), turns)
    raise SelectionError(
        f'{where}: needs either "{columns.text}", a string, or "{columns.messages}", a list of '
        'objects with "role" and "content"'
    )


def occurrences(contents: np.ndarray) -> np.ndarray:
    """How many equal values stand before each one: int32 [n]."""
    order = np.argsort(contents, kind="stable")
    ordered = contents[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    starts = np.repeat(first, np.diff(np.r_[first, len(order)]))
    number = np.empty(len(order), dtype=np.int32)
    number[order] = np.arange(len(order)) - starts
    return number


def content_hash(text: str) -> int:
    """64 bits that stand for a text."""
    # JSON may spell half of a surrogate pair, which plain UTF-8 refuses.
    raw = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


class _Codes:
    """Distinct values in order of appearance."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self.codes = array("i")

    def add(self, value: Any, name: str, where: str) -> None:
        if not isinstance(value, (str, int)):
            raise SelectionError(f'{where}: "{name}" is {_shown(value)}, not a string or integer')
        self.codes.append(self.known.setdefault(str(value), len(self.known)))

    def groups(self) -> Groups:
        return Groups(np.array(self.codes), tuple(self.known))


class _Gathered:
    """What one pass over the records collects."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        # Arrays, not lists of Python numbers, which take five times the memory.
        self.contents, self.lengths, self.inputs = array("Q"), array("i"), array("i")
        self.labels, self.sources = _Codes(), _Codes()
        self.tokens, self.utility = array("q"), array("d")
        self.has_ids = False
        self.ids: list[str] = []
        self.id_blocks: list[Any] = []

    def add(self, number: int, where: str, record: Record) -> None:
        columns, text = self.columns, read_sample(record, self.columns, where).text
        self._add_id(record.get(columns.id), where)
        self.contents.append(content_hash(text))
        self.lengths.append(len(text))
        self.inputs.append(number)
        if columns.label:
            self.labels.add(record.get(columns.label), columns.label, where)
        if columns.source:
            self.sources.add(record.get(columns.source), columns.source, where)
        if columns.tokens:
            self.tokens.append(_count(record.get(columns.tokens), columns.tokens, where))
        if columns.utility:
            self.utility.append(_number(record.get(columns.utility), columns.utility, where))

    def _add_id(self, value: Any, where: str) -> None:
        if not self.contents:  # the first sample decides whether the pool has ids of its own
            self.has_ids = value is not None
        if value is None and not self.has_ids:
            return
        if not self.has_ids or not isinstance(value, (str, int)) or isinstance(value, bool):
            raise SelectionError(
                f'{where}: "{self.columns.id}" is {_shown(value)}; give every sample a string or '
                "an integer, or none"
            )
        self.ids.append(str(value))
        if len(self.ids) == ID_BLOCK:
            self._pack_ids()

    def _pack_ids(self) -> None:
        arrow = load_extra("pyarrow")
        self.id_blocks.append(arrow.array(self.ids, type=arrow.large_string()))
        self.ids = []

    def given_ids(self) -> Any:
        """A pyarrow array of strings; None if the pool has no ids of its own."""
        if not self.has_ids:
            return None
        self._pack_ids()
        return load_extra("pyarrow").concat_arrays(self.id_blocks)


def _listed(messages: Any, columns: Columns, where: str) -> list[Any]:
    if isinstance(messages, list) and messages:
        return messages
    raise SelectionError(f'{where}: "{columns.messages}" is {_shown(messages)}, not a list of them')


def _message(message: Any, where: str) -> Message:
    """Role and content; the text parts of a content in parts."""
    role = message.get("role") if isinstance(message, dict) else None
    content = message.get("content", "") if isinstance(message, dict) else None
    if isinstance(content, list):
        content = "".join(str(p.get("text") or "") for p in content if isinstance(p, dict))
    if isinstance(role, str) and (content is None or isinstance(content, str)):
        return {"role": role, "content": content or ""}
    raise SelectionError(
        f'{where}: a message needs "role" and "content", both strings, not {_shown(message)}'
    )


def _count(value: Any, name: str, where: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise SelectionError(f'{where}: "{name}" is {_shown(value)}, not a number of tokens')


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    raise SelectionError(f'{where}: "{name}" is {_shown(value)}, not a finite number')


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
