"""A plan as the service runs it: lists of its segments on any worker, or whole at one.

A list is ``CHUNK`` positions of a segment (see segments.py). What becomes of it does not depend
on who computes it, so any worker may, and may do so again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import msgspec

from deltaserve.pipeline.adapter import LocalExecutor, Segment
from deltaserve.pipeline.batching import Batch
from deltaserve.pipeline.cache import settings_of
from deltaserve.pipeline.compiling import segments
from deltaserve.pipeline.iterator import Pipeline, prepare, stream_fingerprint
from deltaserve.pipeline.node import Node
from deltaserve.pipeline.plan import Plan
from deltaserve.pipeline.rows import Row
from deltaserve.pipeline.segments import Done
from deltaserve.pipeline.service.ledger import JobSpec
from deltaserve.pipeline.service.rounds import Arrangement, Cost, Rounds


class Elements(Protocol):
    """An iterator whose state says from where to go on."""

    def __iter__(self) -> Elements: ...

    def __next__(self) -> Any: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


@dataclass(frozen=True)
class HostedOptions:
    """Of a stream that workers host for several consumers.

    elements, bytes: of the window; in lockstep, how far the fastest consumer may lead. cost,
    look_ahead, seed: of rounds.
    """

    elements: int = 64
    bytes: int = 1 << 30
    cost: Cost = field(default_factory=Cost)
    look_ahead: int = 64
    seed: int = 0

    def text(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def parse(cls, text: str) -> HostedOptions:
        return msgspec.json.decode(text, type=cls)


@dataclass(frozen=True)
class Program:
    """plan: a prepared one. stream: a digest of all that its elements depend on. cache: a
    directory for the plan's caches, on the worker."""

    plan: Plan
    stream: str
    cache: str | None = None

    @classmethod
    def of(cls, plan: Plan, cache: str | None = None) -> Program:
        """Raises PipelineError: an operator cannot work on what it would get."""
        return cls(prepare(plan), stream_fingerprint(plan), cache)


class Lists:
    """The lists of a program's segments, computed in this process."""

    def __init__(self, program: Program) -> None:
        self._segments = segments(program.plan, cache=settings_of(program.cache))
        self._later: dict[tuple[int, int], Segment] = {}

    def run(self, place: tuple[int, int], start: int, stop: int) -> list[Done]:
        """Lists [start, stop). place: the segment's number, and the pass over its data."""
        segment = self._segment(*place)
        return [segment.run(number) for number in range(start, stop)]

    def _segment(self, number: int, epoch: int) -> Segment:
        if epoch == 0:
            return self._segments[number]
        if (number, epoch) not in self._later:
            self._later = {(number, epoch): Segment(self._segments[number].work, number, epoch)}
        return self._later[number, epoch]


class ShardExecutor:
    """Every ``count``-th list of each segment, computed here: the share of one producer."""

    def __init__(self, member: int, count: int) -> None:
        self._member, self._count = member, count

    def open(self, segment: Segment, first: int) -> Iterator[Done]:
        for number in range(self._member + first * self._count, segment.lists, self._count):
            yield segment.run(number)

    def close(self) -> None:
        pass


def hosted_elements(program: Program, spec: JobSpec, producer: int) -> Elements:
    """What a producer of a job makes: the plan's elements, or rounds of them."""
    settings = settings_of(program.cache)
    if spec.mode != "rounds":
        return Pipeline(program.plan, program.stream, LocalExecutor(), None, settings)
    options = HostedOptions.parse(spec.options)
    plan, batch = unbatched(program.plan)
    window = options.look_ahead * spec.consumers
    plan = packed_in(plan, window)
    share = ShardExecutor(producer, spec.producers)
    stream = f"{program.stream} rows {producer}/{spec.producers} of {window}"
    size = batch.params["n"] if batch is not None else 1
    arrangement = Arrangement(spec.consumers, size, options.look_ahead, options.seed)

    def cost(row: Row) -> float:
        return options.cost.of(sequence_lengths(row))

    def collate(rows: list[Row]) -> Any:
        return rows[0].value if batch is None else batched(rows, batch)

    rows = Rows(Pipeline(plan, stream, share, None, settings))
    return Rounds(rows, arrangement, cost, collate, producer)


class Rows:
    """A pipeline's elements with their keys."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self.get_state, self.set_state = pipeline.get_state, pipeline.set_state

    def __iter__(self) -> Rows:
        return self

    def __next__(self) -> Row:
        return self._pipeline.next_row()


def unbatched(plan: Plan) -> tuple[Plan, Node | None]:
    """The plan without its last batch, and that; rounds put similar rows together themselves,
    so a bucket below the batch goes too."""
    node, batch = plan.root, None
    while node.op in ("prefetch", "bucket") or (node.op == "batch" and batch is None):
        batch = node if node.op == "batch" else batch
        node = node.inputs[0]
    return Plan(node), batch


def packed_in(plan: Plan, rows: int) -> Plan:
    """The plan, its last operator arranging at least so many packed rows at a time: each of its
    windows ends with a row that is not full, which makes one round of a look-ahead uneven."""
    node = plan.root
    if node.op != "pack":
        return plan
    return Plan(replace(node, params={**node.params, "window": max(node.params["window"], rows)}))


def batched(rows: list[Row], batch: Node) -> Any:
    """The rows as one batch, as the plan's own operator makes it."""
    params = {**batch.params, "n": len(rows), "drop_remainder": False}
    return Batch(_Given(rows), batch.name, params).next().value


def sequence_lengths(row: Row) -> list[int]:
    """Of the sequences of tokens in a row: its documents if it is packed."""
    if "seq_lengths" in row.value:
        return [int(length) for length in row.value["seq_lengths"]]
    return [len(row.value["input_ids"])] if "input_ids" in row.value else [1]


class _Given:
    """Rows that are there already, as a stream."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = iter(rows)

    def next(self) -> Row:
        return next(self._rows)

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        raise AssertionError("nobody restores a batch")

    def close(self) -> None:
        pass
