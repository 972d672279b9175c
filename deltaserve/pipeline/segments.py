"""Segments: the parts of a plan that rows pass one by one, so that workers can share them.

A segment is a graph of sources, index operators (which say what row comes at which position)
and element operators (which treat rows one by one). Both kinds commute: a shuffle above a map
is a shuffle of row numbers below it. So the row at any position is known from its number alone,
lists of positions can be computed anywhere, and the results do not depend on who did it.
Everything above segments is a stream; see streams.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from deltaserve.pipeline.elements import Element, element
from deltaserve.pipeline.node import Node
from deltaserve.pipeline.operators import ELEMENT, INDEX, OPERATORS, SOURCE
from deltaserve.pipeline.rows import Key, Row, RowError
from deltaserve.pipeline.sources import Source, open_source

# Positions that a worker does at a time.
CHUNK = 64
# What index operators do to rows that were dropped or multiplied below them they cannot know.
COUNTING = ("take", "mix", "interleave")


class Probe(Protocol):
    """Measures operators; see tracing.py. It is sent to worker processes."""

    def wrap(self, name: str, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Around what an operator does to a list (of row numbers for a source, of keys for a
        cache, else of rows); a cache calls what is below it."""

    def wrap_next(self, name: str, call: Callable[[], Row]) -> Callable[[], Row]:
        """Around how a stream operator gives its next row; calls nest."""

    def collect(self) -> Any:
        """In the worker, after each list: what was measured since the last; picklable."""

    def merge(self, measured: Any) -> None:
        """At the consumer: add what a worker collected."""


class Done:
    """What became of one list of positions. Not a tuple: Grain would take it apart.

    notes: what the user should know, wherever the list was computed."""

    __slots__ = ("measured", "notes", "rows", "skipped")

    def __init__(
        self, rows: list[Row], skipped: int, measured: Any = None, notes: Sequence[str] = ()
    ) -> None:
        self.rows, self.skipped, self.measured, self.notes = rows, skipped, measured, notes


@dataclass
class Leaf:
    """One source within a segment, and what happens to its rows, first things first."""

    source: Node
    elements: list[Node] = field(default_factory=list)


def in_segment(node: Node) -> bool:
    """Whether all of this is known by row number."""
    kind = OPERATORS[node.op].kind
    if kind == SOURCE:
        return True
    indexed = kind in (ELEMENT, INDEX) or node.op == "interleave"
    if node.op in COUNTING and not all(map(one_to_one, node.inputs)):
        return False
    return indexed and all(map(in_segment, node.inputs))


def one_to_one(node: Node) -> bool:
    """Whether positions below are rows above, in the part of a segment from here down."""
    parts = node.params["parts"] if node.op == "fused" else (node,)
    alone = all(OPERATORS[part.op].one_to_one for part in parts)
    return alone and all(map(one_to_one, node.inputs))


def leaves_of(node: Node) -> list[Leaf]:
    """The sources below, from left to right; one that is used twice counts twice."""
    kind = OPERATORS[node.op].kind
    if kind == SOURCE:
        return [Leaf(node)]
    leaves = [leaf for below in node.inputs for leaf in leaves_of(below)]
    if kind == ELEMENT:
        for leaf in leaves:
            leaf.elements.append(node)
    return leaves


class Work:
    """What a worker does: from keys to finished rows. Sources and tokenizers are opened in the
    process where they are used.

    first_leaf: the number that keys give to the segment's first source.
    """

    def __init__(
        self,
        root: Node,
        first_leaf: int = 0,
        *,
        probe: Probe | None = None,
        cache: Any = None,
    ) -> None:
        self.root, self.first_leaf = root, first_leaf
        self.probe, self.cache = probe, cache
        self._sources: list[Source] | None = None
        self._chains: list[Callable[[list[Key]], tuple[list[Row], list[Key]]]] | None = None
        self._notes: list[str] = []

    def sources(self) -> list[Source]:
        """Opened, one for each leaf. Raises PipelineError."""
        if self._sources is None:
            opened: dict[int, Source] = {}
            found = []
            for leaf in leaves_of(self.root):
                if id(leaf.source) not in opened:
                    opened[id(leaf.source)] = open_source(leaf.source)
                found.append(opened[id(leaf.source)])
            self._sources = found
        return self._sources

    def prepare(self) -> None:
        """Open everything, so that what is missing is told before anything runs."""
        if self._chains is None:
            leaves, sources = leaves_of(self.root), self.sources()
            made: dict[int, Element] = {}
            self._chains = [
                self._chain(leaf, source, made)
                for leaf, source in zip(leaves, sources, strict=True)
            ]

    def __call__(self, keys: Sequence[Key]) -> Done:
        if self._chains is None:
            self.prepare()
        chains = self._chains
        assert chains is not None
        groups: dict[int, list[Key]] = {}
        for key in keys:
            groups.setdefault(key[0], []).append(key)
        done = {leaf: chains[leaf - self.first_leaf](group) for leaf, group in groups.items()}
        skipped = sum(len(broken) for _, broken in done.values())
        rows = next(iter(done.values()))[0] if len(done) == 1 else _merged(keys, done)
        measured = self.probe.collect() if self.probe else None
        # All of them each time: the consumer knows which are new.
        return Done(rows, skipped, measured, tuple(self._notes))

    def close(self) -> None:
        for source in self._sources or ():
            source.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chains": None}

    def _chain(
        self, leaf: Leaf, source: Source, made: dict[int, Element]
    ) -> Callable[[list[Key]], tuple[list[Row], list[Key]]]:
        marks = [at for at, node in enumerate(leaf.elements) if node.op == "cache"]
        below = [
            node for node in leaf.elements[: marks[-1] if marks else None] if node.op != "cache"
        ]
        steps = self._steps(below, made)
        read = _reader(self._wrap(leaf.source.name, source.read), steps, source.where)
        if not marks:
            return read
        from deltaserve.pipeline.cache import cached_reader

        mark = leaf.elements[marks[-1]]
        kept = cached_reader(read, leaf.source, source, below, self.cache, self._notes.append)
        above = self._steps(leaf.elements[marks[-1] + 1 :], made)
        mine = threading.local()

        def keep(keys: list[Key]) -> list[Row]:
            rows, mine.broken = kept(keys)
            return rows

        keep_measured = self._wrap(mark.name, keep)

        def run(keys: list[Key]) -> tuple[list[Row], list[Key]]:
            rows = keep_measured(keys)
            with _named(source.where):
                for step in above:
                    rows = step(rows)
            return rows, mine.broken

        return run

    def _steps(self, nodes: Sequence[Node], made: dict[int, Element]) -> list[Element]:
        for node in nodes:
            if id(node) not in made:
                made[id(node)] = self._wrap(node.name, element(node))
        return [made[id(node)] for node in nodes]

    def _wrap(self, name: str, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return self.probe.wrap(name, call) if self.probe else call


def _reader(
    read: Callable[[list[int]], list[Any]],
    steps: Sequence[Element],
    where: Callable[[int], str],
) -> Callable[[list[Key]], tuple[list[Row], list[Key]]]:
    def run(keys: list[Key]) -> tuple[list[Row], list[Key]]:
        values = read([key[2] for key in keys])
        rows = [
            Row(key, value) for key, value in zip(keys, values, strict=True) if value is not None
        ]
        skipped = [key for key, value in zip(keys, values, strict=True) if value is None]
        with _named(where):
            for step in steps:
                rows = step(rows)
        return rows, skipped

    return run


@contextmanager
def _named(where: Callable[[int], str]) -> Iterator[None]:
    """Errors of rows tell where they stand in the source's files."""
    try:
        yield
    except RowError as error:
        place = where(error.key[2])
        raise RowError(error.operator, error.key, error.what, place) from error.__cause__


def _merged(keys: Sequence[Key], done: dict[int, tuple[list[Row], list[Key]]]) -> list[Row]:
    """Rows of several leaves in the order of the positions that they came from."""
    at = dict.fromkeys(done, 0)
    merged = []
    for key in keys:
        rows = done[key[0]][0]
        while at[key[0]] < len(rows) and rows[at[key[0]]].key[:3] == key:
            merged.append(rows[at[key[0]]])
            at[key[0]] += 1
    return merged
