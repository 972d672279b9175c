"""What the dispatcher must remember: jobs, who was granted what, and how far they got.

The state changes by records alone, so replaying a journal leads to the same state. Nothing here
knows time, workers' health or Ray.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from deltaserve.errors import ServiceError
from deltaserve.pipeline.service.journal import Record

Range = tuple[int, int]
"""Lists ``[start, stop)`` of a segment of the plan."""

SPLIT_MODES = ("ordered", "dynamic")
HOSTED_MODES = ("window", "lockstep", "rounds")
# Of a producer; when there are more, every second is dropped.
MOST_MARKS = 64


@dataclass(frozen=True)
class JobSpec:
    """What all consumers of a job agree on.

    stream: digest of the plan with its seeds: what the elements depend on. mode: one of
    SPLIT_MODES (consumers share a segment's lists) or HOSTED_MODES (consumers share a finished
    stream). length: of the segment, in lists. split: lists per range.
    producers: streams of a job in rounds. options: of the mode, as text.
    """

    name: str
    stream: str
    mode: str
    consumers: int = 1
    length: int | None = None
    split: int = 1
    relaxed: bool = False
    producers: int = 1
    options: str = ""

    @property
    def hosted(self) -> bool:
        return self.mode in HOSTED_MODES


def ordered_range(spec: JobSpec, member: int, number: int) -> Range | None:
    """Member i of n (consumers; or producers, of a hosted stream) reads the ranges i, i + n,
    i + 2n, ...; None after the end of the source."""
    members = spec.producers if spec.hosted else spec.consumers
    start = (number * members + member) * spec.split
    if spec.length is None:
        return start, start + spec.split
    return (start, min(start + spec.split, spec.length)) if start < spec.length else None


@dataclass
class Job:
    spec: JobSpec
    cursor: int = 0
    """The first position that nobody was granted (dynamic jobs)."""
    grants: list[list[Range]] = field(default_factory=list)
    """Of each consumer, in the order in which it reads them (dynamic jobs)."""
    acked: list[int] = field(default_factory=list)
    """Of each consumer: the element after its last checkpoint (hosted streams)."""
    marks: list[list[tuple[int, Any]]] = field(default_factory=list)
    """Of each producer: element numbers, and the state from which they can be made again."""
    hosts: list[list[tuple[int, str, int]]] = field(default_factory=list)
    """Of each producer: from this element on, this worker makes them, under this epoch."""


class Ledger:
    def __init__(self) -> None:
        self.incarnation = 0
        self.jobs: dict[str, Job] = {}

    def job(self, name: str) -> Job:
        try:
            return self.jobs[name]
        except KeyError:
            raise ServiceError(
                f"the service knows no job '{name}'; it was forgotten, or never registered"
            ) from None

    def apply(self, record: Record) -> None:
        getattr(self, "_" + record["op"])(record)

    def records(self) -> list[Record]:
        """A short history that leads here."""
        jobs = [msgspec.to_builtins(job) for job in self.jobs.values()]
        return [{"op": "snapshot", "incarnation": self.incarnation, "jobs": jobs}]

    def _snapshot(self, record: Record) -> None:
        self.incarnation = record["incarnation"]
        jobs = [msgspec.convert(job, Job) for job in record["jobs"]]
        self.jobs = {job.spec.name: job for job in jobs}

    def _start(self, record: Record) -> None:
        self.incarnation += 1

    def _register(self, record: Record) -> None:
        spec = msgspec.convert(record["spec"], JobSpec)
        job = Job(spec)
        job.grants = [[] for _ in range(spec.consumers)]
        job.acked = [0] * spec.consumers
        job.marks = [[] for _ in range(spec.producers)]
        job.hosts = [[] for _ in range(spec.producers)]
        self.jobs[spec.name] = job

    def _forget(self, record: Record) -> None:
        self.jobs.pop(record["job"], None)

    def _grant(self, record: Record) -> None:
        job = self.jobs[record["job"]]
        for start, stop in record["ranges"]:
            assert start == job.cursor
            job.cursor = stop
            job.grants[record["consumer"]].append((start, stop))

    def _ack(self, record: Record) -> None:
        job = self.jobs[record["job"]]
        job.acked[record["consumer"]] = record["number"]
        for producer in range(job.spec.producers):
            _forget_marks(job, producer)

    def _mark(self, record: Record) -> None:
        job = self.jobs[record["job"]]
        marks = job.marks[record["producer"]]
        marks[:] = [mark for mark in marks if mark[0] < record["index"]]
        marks.append((record["index"], record["state"]))
        _forget_marks(job, record["producer"])

    def _host(self, record: Record) -> None:
        """A worker makes a producer's elements from ``start`` on; ``alone``: also all before."""
        hosts = self.jobs[record["job"]].hosts[record["producer"]]
        if record["alone"]:
            hosts.clear()
        hosts.append((record["start"], record["worker"], record["epoch"]))


def _forget_marks(job: Job, producer: int) -> None:
    """Keep the last mark that everybody is beyond, and all after it."""
    oldest = min(job.acked) // job.spec.producers
    marks = job.marks[producer]
    first = max((at for at, mark in enumerate(marks) if mark[0] <= oldest), default=0)
    del marks[:first]
    if len(marks) > MOST_MARKS:
        del marks[1:-1:2]
