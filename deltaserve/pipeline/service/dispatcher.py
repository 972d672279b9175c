"""The dispatcher: who reads which part of the source, and which worker prepares it.

Elements never pass through it. What it promises (grants, checkpoints, which worker hosts a shared
stream) is in the journal before it answers; what can be found out again (which worker prepares a
granted range, who is alive) is not.

A *grant* gives a range of the source to a consumer, for ever, in an order that the consumer can
ask for again: a consumer that returns with an older checkpoint reads the same ranges again. A
*lease* says which worker prepares a grant; its epoch grows with every new lease, so that what a
worker sends under an older one is known to be late.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltaserve.errors import ServiceError
from deltaserve.pipeline.service.autoscale import Demand, Scaler
from deltaserve.pipeline.service.journal import Journal, Record
from deltaserve.pipeline.service.ledger import HOSTED_MODES, SPLIT_MODES, Job, JobSpec, Ledger
from deltaserve.pipeline.service.membership import Workers

# Rounds for which a consumer need not ask again who makes them; a worker joins after these.
PROMISE = 32


@dataclass(frozen=True)
class Lease:
    """number: of the grant, among its consumer's. worker: empty while there is none."""

    number: int
    start: int
    stop: int
    worker: str = ""
    epoch: int = 0


@dataclass(frozen=True)
class Place:
    """Who makes a producer's elements, and up to which element (exclusive) that holds."""

    worker: str
    epoch: int
    until: int


class Dispatcher:
    """clock: seconds. heartbeat_limit_s: a worker silent for longer counts as dead.
    consumer_limit_s: a consumer silent for longer loses what it has beyond its checkpoint to the
    others (dynamic jobs); None: it is waited for."""

    def __init__(
        self,
        folder: Path,
        *,
        heartbeat_limit_s: float = 5.0,
        consumer_limit_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._limit = heartbeat_limit_s
        self._consumer_limit = consumer_limit_s
        self._ledger = Ledger()
        self._journal = Journal(folder, self._ledger.apply)
        self._write({"op": "start"})
        hosting = {
            worker
            for job in self._ledger.jobs.values()
            for hosts in job.hosts
            for _, worker, _ in hosts
        }
        # Workers outlive a dispatcher: those that the journal names have until the limit to call.
        self._workers = Workers(heartbeat_limit_s, hosting, clock())
        self._leases: dict[tuple[str, int, int], tuple[str, int]] = {}
        self._epoch = self._ledger.incarnation << 32
        self._promised: dict[tuple[str, int], int] = {}
        self._seen: dict[tuple[str, int], float] = {}
        self._demands: dict[tuple[str, int], tuple[float, Demand]] = {}
        self._scaler = Scaler()
        self.granted = 0

    # ---- workers

    def beat(self, worker: str, node: str, throughput: float) -> None:
        """A worker is alive; throughput: source positions it prepares in a second of work, 0
        while unknown."""
        if self._workers.beat(worker, node, throughput, self._clock()):
            self._hand_over(worker)

    def leave(self, worker: str) -> None:
        """A worker goes; what it had is given to others when its consumers ask."""
        self._workers.remove(worker)

    def workers(self) -> list[str]:
        return self._workers.alive(self._clock())

    # ---- jobs

    def register(self, spec: JobSpec) -> None:
        """Register a job, or join it.

        Raises:
            ServiceError: a job of this name exists and differs.
        """
        found = self._ledger.jobs.get(spec.name)
        if found is None:
            self._write({"op": "register", "spec": asdict(spec)})
            return
        new, old = asdict(spec), asdict(found.spec)
        wrong = [f"{key} is {old[key]!r}, not {new[key]!r}" for key in new if new[key] != old[key]]
        if wrong:
            raise ServiceError(
                f"job '{spec.name}' exists and differs: {'; '.join(wrong)}. "
                "Use another job name, or forget the old job"
            )

    def forget(self, job: str) -> None:
        """All that is known of a job."""
        self._write({"op": "forget", "job": job})
        for table in (self._leases, self._promised, self._seen, self._demands):
            for key in [key for key in table if key[0] == job]:
                del table[key]  # type: ignore[attr-defined]

    def next_grant(self, job: str, consumer: int) -> int:
        """The number of the next grant that the consumer did not have."""
        return len(self._job(job, consumer).grants[consumer])

    def acquire(
        self, job: str, consumer: int, first: int, count: int, done: int, node: str = ""
    ) -> list[Lease]:
        """Up to ``count`` grants from number ``first`` on, each with a worker. Fewer: the source
        ended. Asking again gives the same. done: grants below it will not be asked for again
        unless the consumer returns with an older checkpoint.

        Raises:
            ServiceError: the consumer's checkpoint is beyond what it was granted.
        """
        found = self._job(job, consumer)
        self._seen[job, consumer] = self._clock()
        self._reclaim_lost(found)
        if found.spec.mode == "dynamic":
            ranges = self._dynamic(found, consumer, first, count)
        else:
            ranges = _static(found.spec, consumer, first, count)
        for number in range(max(0, done - 2 * count), done):
            self._release(job, consumer, number)
        numbered = enumerate(ranges, first)
        return [self._lease(job, consumer, n, start, stop, node) for n, (start, stop) in numbered]

    def replace(self, job: str, consumer: int, lease: Lease, node: str = "") -> Lease:
        """Another lease for a grant whose worker failed; the same if somebody already did."""
        self._job(job, consumer)
        self._seen[job, consumer] = self._clock()
        key = (job, consumer, lease.number)
        worker, epoch = self._leases.get(key, ("", 0))
        if worker and epoch != lease.epoch and worker in self._workers.alive(self._clock()):
            return Lease(lease.number, lease.start, lease.stop, worker, epoch)
        self._release(*key)
        if lease.worker:
            self._workers.suspect(lease.worker, self._clock())
        return self._lease(job, consumer, lease.number, lease.start, lease.stop, node)

    def ack(self, job: str, consumer: int, number: int, offset: int) -> None:
        """A checkpoint: the next element is ``offset`` of grant ``number`` (source positions),
        or, in a hosted mode, element ``number`` of the stream."""
        self._job(job, consumer)
        self._seen[job, consumer] = self._clock()
        record = {"op": "ack", "job": job, "consumer": consumer}
        self._write(record | {"number": number, "offset": offset})

    # ---- hosted streams

    def locate(self, job: str, producer: int, index: int, failed: int = 0) -> Place:
        """Who makes element ``index`` of a producer. failed: the epoch of a place that did not
        answer. The worker is empty while there is none."""
        found = self._job(job)
        now = self._clock()
        hosts = found.hosts[producer]
        at = max((i for i, host in enumerate(hosts) if host[0] <= index), default=-1)
        alive = self._workers.alive(now)
        if at < 0 or hosts[at][2] == failed or hosts[at][1] not in alive:
            if at >= 0:
                self._workers.suspect(hosts[at][1], now)
            worker = self._workers.choose(now)
            if not worker:
                return Place("", 0, index)
            self._host(found, producer, worker, 0, alone=True)
            hosts, at = found.hosts[producer], 0
        until = max(index + 1, self._promised.get((job, producer), 0), index + PROMISE)
        if at + 1 < len(hosts):
            until = hosts[at + 1][0]
        elif found.spec.mode == "rounds":
            self._promised[job, producer] = until
        return Place(hosts[at][1], hosts[at][2], until)

    def mark(self, job: str, producer: int, index: int, state: Any) -> None:
        """From ``state``, a host makes the producer's elements from ``index`` on."""
        self._job(job)
        record = {"op": "mark", "job": job, "producer": producer}
        self._write(record | {"index": index, "state": state})

    def marks(self, job: str, producer: int) -> list[tuple[int, Any]]:
        """What was marked and may still be wanted, oldest first."""
        return list(self._job(job).marks[producer])

    # ---- demand

    def report(self, job: str, consumer: int, demand: float, local: float) -> None:
        """Source positions a second that a consumer wants, and that its own host prepares."""
        now = self._clock()
        self._seen[job, consumer] = now
        self._demands[job, consumer] = (now, Demand(demand, local))

    def withdraw(self, job: str, consumer: int) -> None:
        """A consumer wants nothing more, and stays away."""
        self._demands.pop((job, consumer), None)
        for key in [key for key in self._leases if key[:2] == (job, consumer)]:
            self._release(*key)

    def wanted_workers(self) -> int:
        """ceil(demand / throughput); 0 when nobody asks."""
        now = self._clock()
        current = {
            key: demand for key, (at, demand) in self._demands.items() if now - at <= self._limit
        }
        throughputs = self._workers.throughputs(now)
        return self._scaler.target(list(current.values()), throughputs, len(self.workers()))

    def stats(self) -> dict[str, Any]:
        now = self._clock()
        jobs = {
            name: {
                "mode": job.spec.mode,
                "granted": job.cursor,
                "returned": len(job.returned),
                "checkpoints": [list(at) for at in job.acked],
                "hosts": [list(map(list, hosts)) for hosts in job.hosts],
            }
            for name, job in self._ledger.jobs.items()
        }
        return {
            "incarnation": self._ledger.incarnation,
            "workers": self._workers.alive(now),
            "leases": len(self._leases),
            "journal_bytes": self._journal.bytes,
            "jobs": jobs,
        }

    def close(self) -> None:
        self._journal.close()

    # ---- inside

    def _write(self, record: Record) -> None:
        self._journal.append(record)
        self._ledger.apply(record)
        if self._journal.wants_compaction():
            self._journal.compact(self._ledger.records())

    def _job(self, name: str, consumer: int = 0) -> Job:
        job = self._ledger.job(name)
        if not 0 <= consumer < job.spec.consumers:
            raise ServiceError(
                f"job '{name}' has consumers 0 to {job.spec.consumers - 1}, not {consumer}"
            )
        return job

    def _dynamic(self, job: Job, consumer: int, first: int, count: int) -> list[tuple[int, int]]:
        grants = job.grants[consumer]
        if first > len(grants):
            raise ServiceError(
                f"consumer {consumer} of job '{job.spec.name}' returns at grant {first}, but has "
                f"only {len(grants)}: the others were given the rest while it was away. Restore "
                "an older checkpoint, or use another job name"
            )
        new = _next_ranges(job, first + count - len(grants))
        if new:
            record: Record = {"op": "grant", "job": job.spec.name, "consumer": consumer}
            self._write(record | {"ranges": new})
            self.granted += len(new)
        return grants[first : first + count]

    def _lease(
        self, job: str, consumer: int, number: int, start: int, stop: int, node: str
    ) -> Lease:
        now = self._clock()
        worker, epoch = self._leases.get((job, consumer, number), ("", 0))
        if worker not in self._workers.alive(now):
            self._release(job, consumer, number)
            worker = self._workers.take(now, node)
            if worker:
                epoch = self._next_epoch()
                self._leases[job, consumer, number] = (worker, epoch)
        return Lease(number, start, stop, worker, epoch)

    def _release(self, job: str, consumer: int, number: int) -> None:
        worker, _ = self._leases.pop((job, consumer, number), ("", 0))
        if worker:
            self._workers.give_back(worker)

    def _next_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    def _reclaim_lost(self, job: Job) -> None:
        if self._consumer_limit is None or job.spec.mode != "dynamic":
            return
        now = self._clock()
        for consumer in range(job.spec.consumers):
            seen = self._seen.setdefault((job.spec.name, consumer), now)
            number, position = job.acked[consumer]
            if now - seen > self._consumer_limit and len(job.grants[consumer]) > number:
                record: Record = {"op": "reclaim", "job": job.spec.name, "consumer": consumer}
                self._write(record | {"number": number, "position": position})

    def _host(self, job: Job, producer: int, worker: str, start: int, *, alone: bool) -> None:
        record: Record = {"op": "host", "job": job.spec.name, "producer": producer}
        place = {"worker": worker, "epoch": self._next_epoch(), "start": start, "alone": alone}
        self._write(record | place)

    def _hand_over(self, worker: str) -> None:
        """A new worker takes its share of the producers of jobs in rounds, each from the first
        round on that nobody was promised from its old host."""
        alive = self.workers()
        for job in self._ledger.jobs.values():
            if job.spec.mode != "rounds" or not all(job.hosts):
                continue
            last = [hosts[-1][1] for hosts in job.hosts]
            for _ in range(job.spec.producers // len(alive) - last.count(worker)):
                busiest = max(sorted(set(last)), key=last.count)
                if last.count(busiest) <= last.count(worker) + 1:
                    break
                producer = last.index(busiest)
                target = self._promised.get((job.spec.name, producer))
                if target is None:
                    break
                self._host(job, producer, worker, target, alone=False)
                last[producer] = worker


def _static(spec: JobSpec, consumer: int, first: int, count: int) -> list[tuple[int, int]]:
    """Ordered: consumer i of n reads the ranges i, i + n, i + 2n, ..."""
    ranges = []
    for number in range(first, first + count):
        start = (number * spec.consumers + consumer) * spec.split
        stop = start + spec.split if spec.length is None else min(start + spec.split, spec.length)
        if start >= stop:
            break
        ranges.append((start, stop))
    return ranges


def _next_ranges(job: Job, count: int) -> list[tuple[int, int]]:
    """Not yet granted: first what was given back."""
    ranges = job.returned[: max(count, 0)]
    cursor, length = job.cursor, job.spec.length
    while len(ranges) < count and (length is None or cursor < length):
        stop = cursor + job.spec.split
        stop = stop if length is None else min(stop, length)
        ranges.append((cursor, stop))
        cursor = stop
    return ranges


__all__ = ["HOSTED_MODES", "SPLIT_MODES", "Dispatcher", "JobSpec", "Lease", "Place"]
