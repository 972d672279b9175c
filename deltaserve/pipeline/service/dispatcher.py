"""The dispatcher: who reads which part of the source, and which worker prepares it.

Elements never pass through it. What it promises (grants, checkpoints, which worker hosts a shared
stream) is in the journal before it answers; what can be found out again (which worker prepares a
granted range, who is alive) is not. Every command may be repeated: the answer was lost, or the
dispatcher died after writing it down.

A *grant* gives a range of the source to a consumer, for ever, in an order that the consumer can
ask for again: a consumer that returns with an older checkpoint reads the same ranges again. A
*lease* says which worker prepares a grant. It ends with its worker's heartbeats, or when the
consumer says that the worker failed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltaserve.errors import ServiceError
from deltaserve.pipeline.service.autoscale import Demand, Scaler, need
from deltaserve.pipeline.service.journal import Journal, Record
from deltaserve.pipeline.service.ledger import Job, JobSpec, Ledger, Range, ordered_range
from deltaserve.pipeline.service.membership import Workers

# Elements for which a consumer need not ask again who makes them. In jobs of rounds a worker that
# joins takes over after these, so that all consumers change to it at the same round.
PROMISE = 32
FORGETFUL = 3 * PROMISE


@dataclass(frozen=True)
class Lease:
    """Who prepares a grant; the worker is empty while there is none. epoch: of this lease."""

    worker: str = ""
    epoch: int = 0


@dataclass(frozen=True)
class Place:
    """Who makes a producer's elements, and up to which element (exclusive) that holds."""

    worker: str
    epoch: int
    until: int


class Dispatcher:
    """clock: seconds. heartbeat_limit_s: a worker that is silent for longer counts as dead."""

    def __init__(
        self,
        folder: Path,
        *,
        heartbeat_limit_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._limit = heartbeat_limit_s
        self._ledger = Ledger()
        self._journal = Journal(folder, self._ledger.apply)
        self._write({"op": "start"})
        # Workers outlive a dispatcher: those that the journal names have until the limit to call.
        self._workers = Workers(heartbeat_limit_s, self._hosting(), clock())
        self._leases: dict[tuple[str, int], dict[int, Lease]] = {}
        self._epoch = self._ledger.incarnation << 32
        self._promised: dict[tuple[str, int], int] = {}
        self._demands: dict[tuple[str, int], tuple[float, Demand]] = {}
        self._rates: dict[str, list[float]] = {}
        self._scaler = Scaler()

    # ---- workers

    def beat(self, worker: str, node: str, rates: Mapping[str, float]) -> None:
        """A worker is alive. rates: of each job, what it prepares in a second of work."""
        self._workers.beat(worker, node, rates, self._clock())

    def leave(self, worker: str) -> None:
        """A worker goes; what it had is given to others when its consumers ask."""
        self._workers.remove(worker)

    def suspect(self, worker: str) -> None:
        """It did not answer, and gets nothing until its next sign of life."""
        self._workers.suspect(worker, self._clock())

    def workers(self) -> list[str]:
        return self._workers.alive(self._clock())

    def idlest(self, count: int) -> list[str]:
        """The workers that would be missed least."""
        hosting = self._hosting()
        alive = self.workers()
        return sorted(alive, key=lambda name: (hosting[name], self._workers.leases(name)))[:count]

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
        if job in self._ledger.jobs:
            for consumer in range(self._ledger.jobs[job].spec.consumers):
                self.withdraw(job, consumer)
            self._write({"op": "forget", "job": job})
        self._promised = {key: at for key, at in self._promised.items() if key[0] != job}

    # ---- splits

    def granted(self, job: str, consumer: int) -> int:
        """How many grants a consumer has had."""
        return len(self._job(job, consumer).grants[consumer])

    def grant(self, job: str, consumer: int, first: int, count: int) -> list[Range]:
        """The ranges of a consumer's grants from number ``first`` on; fewer than ``count`` if
        the source ends. Asking again gives the same.

        Raises:
            ServiceError: the consumer's checkpoint is beyond what it was granted.
        """
        found = self._job(job, consumer)
        if found.spec.mode == "ordered":
            numbers = range(first, first + count)
            turns = (ordered_range(found.spec, consumer, number) for number in numbers)
            return [turn for turn in turns if turn is not None]
        grants = found.grants[consumer]
        if first > len(grants):
            raise ServiceError(
                f"consumer {consumer} of job '{job}' returns at grant {first}, but was given "
                f"only {len(grants)}: its checkpoint belongs to another work folder or job"
            )
        new = _next_ranges(found, first + count - len(grants))
        if new:
            record: Record = {"op": "grant", "job": job, "consumer": consumer}
            self._write(record | {"ranges": new})
        return grants[first : first + count]

    def lease(
        self, job: str, consumer: int, number: int, done: int, failed: int = 0, node: str = ""
    ) -> Lease:
        """The worker that prepares a grant. done: grants below it have been prepared. failed:
        the epoch of a lease that brought nothing. node: where the consumer runs."""
        self._job(job, consumer)
        now = self._clock()
        leases = self._leases.setdefault((job, consumer), {})
        for old in [old for old in leases if old < done]:
            self._workers.lease(leases.pop(old).worker, -1)
        found = leases.get(number)
        if found is not None:
            if found.epoch != failed and found.worker in self._workers.alive(now):
                return found
            self._workers.suspect(found.worker, now)
            self._workers.lease(leases.pop(number).worker, -1)
        worker = self._workers.choose(now, self._hosting(), node)
        if not worker:
            return Lease()
        self._workers.lease(worker, 1)
        leases[number] = Lease(worker, self._next_epoch())
        return leases[number]

    # ---- hosted streams

    def locate(self, job: str, producer: int, index: int, failed: int = 0) -> Place:
        """Who makes element ``index`` of a producer. failed: the epoch of a place that did not
        answer. The worker is empty while there is none."""
        found = self._job(job)
        now = self._clock()
        hosts, at = found.hosts[producer], _segment(found.hosts[producer], index)
        if at < 0 or hosts[at][2] == failed or hosts[at][1] not in self._workers.alive(now):
            if at >= 0:
                self._workers.suspect(hosts[at][1], now)
            worker = self._workers.choose(now, self._hosting())
            if not worker:
                return Place("", 0, index)
            self._host(found, producer, worker, 0, alone=True)
        elif found.spec.mode == "rounds":
            self._rebalance(found, producer, index)
        hosts, at = found.hosts[producer], _segment(found.hosts[producer], index)
        last = at + 1 == len(hosts)
        until = self._promise(job, producer, index) if last else hosts[at + 1][0]
        return Place(hosts[at][1], hosts[at][2], until)

    def ack(self, job: str, consumer: int, number: int) -> None:
        """A checkpoint: the consumer will not ask for elements before ``number`` again, unless
        it returns with an older one (which costs making more of them again)."""
        self._job(job, consumer)
        self._write({"op": "ack", "job": job, "consumer": consumer, "number": number})

    def mark(self, job: str, producer: int, index: int, state: Any) -> None:
        """From ``state``, a host makes the producer's elements from ``index`` on."""
        self._job(job)
        record = {"op": "mark", "job": job, "producer": producer}
        self._write(record | {"index": index, "state": state})

    def marks(self, job: str, producer: int) -> list[tuple[int, Any]]:
        """What was marked and may still be wanted, oldest first."""
        return list(self._job(job).marks[producer])

    # ---- demand

    def report(self, job: str, consumer: int, wanted: float, local: float, node: str = "") -> None:
        """What a consumer would take in a second if it never waited, and what its own host
        prepares: positions of the source, or elements of a hosted stream. node: where it runs."""
        self._demands[job, consumer] = (self._clock(), Demand(wanted, local, node))

    def withdraw(self, job: str, consumer: int) -> None:
        """A consumer wants nothing more for now."""
        self._demands.pop((job, consumer), None)
        for lease in self._leases.pop((job, consumer), {}).values():
            self._workers.lease(lease.worker, -1)

    def wanted_workers(self) -> int:
        """The sum over jobs of demand / throughput, rounded up; 0 when nobody asks."""
        unmet: dict[str, list[float]] = {}
        for job, demand in self._current():
            unmet.setdefault(job, []).append(demand.unmet)
        now = self._clock()
        needs = [self._need(job, demands, now) for job, demands in unmet.items()]
        return self._scaler.target(needs, len(self.workers()))

    def wanting_nodes(self) -> list[str]:
        """The nodes of consumers that want more than they have, the neediest first: where the
        next workers should run."""
        unmet: dict[str, float] = {}
        for _, demand in self._current():
            if demand.unmet > 0 and demand.node:
                unmet[demand.node] = unmet.get(demand.node, 0.0) + demand.unmet
        return sorted(unmet, key=lambda node: -unmet[node])

    def stats(self) -> dict[str, Any]:
        jobs = {
            name: {
                "mode": job.spec.mode,
                "granted": job.cursor,
                "checkpoints": list(job.acked),
                "hosts": [list(map(list, hosts)) for hosts in job.hosts],
            }
            for name, job in self._ledger.jobs.items()
        }
        return {
            "incarnation": self._ledger.incarnation,
            "workers": self.workers(),
            "leases": sum(map(len, self._leases.values())),
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

    def _next_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    def _hosting(self) -> Counter[str]:
        """How many producers each worker hosts."""
        jobs = self._ledger.jobs.values()
        return Counter(hosts[-1][1] for job in jobs for hosts in job.hosts if hosts)

    def _host(self, job: Job, producer: int, worker: str, start: int, *, alone: bool) -> None:
        record: Record = {"op": "host", "job": job.spec.name, "producer": producer}
        place = {"worker": worker, "epoch": self._next_epoch(), "start": start, "alone": alone}
        self._write(record | place)

    def _promise(self, job: str, producer: int, index: int) -> int:
        # What an earlier dispatcher promised is not known, but is at most this far ahead.
        known = self._promised.get((job, producer), index + FORGETFUL)
        until = known if index < known else index + PROMISE
        self._promised[job, producer] = until
        return until

    def _rebalance(self, job: Job, producer: int, index: int) -> None:
        """Where the promises for a producer end, it may move to a worker with less to do."""
        target = self._promised.get((job.spec.name, producer))
        if target is None or index < target or job.hosts[producer][-1][0] > index:
            return
        last = Counter(hosts[-1][1] for hosts in job.hosts if hosts)
        fewest = min(self.workers(), key=lambda name: (last[name], name))
        if last[job.hosts[producer][-1][1]] > last[fewest] + 1:
            self._host(job, producer, fewest, index, alone=False)

    def _current(self) -> list[tuple[str, Demand]]:
        now = self._clock()
        return [
            (job, demand)
            for (job, _), (at, demand) in self._demands.items()
            if now - at <= self._limit and job in self._ledger.jobs
        ]

    def _need(self, name: str, unmet: list[float], now: float) -> float:
        spec = self._ledger.jobs[name].spec
        rates = self._workers.rates(name, now) or self._rates.get(name, [])
        self._rates[name] = rates
        if spec.hosted:  # all consumers want the same elements
            return min(need(max(unmet), rates), spec.producers)
        return need(sum(unmet), rates)


def _segment(hosts: list[tuple[int, str, int]], index: int) -> int:
    """Which entry makes element ``index``; -1: none."""
    return max((at for at, host in enumerate(hosts) if host[0] <= index), default=-1)


def _next_ranges(job: Job, count: int) -> list[Range]:
    """Not yet granted to anybody."""
    ranges: list[Range] = []
    cursor, length = job.cursor, job.spec.length
    while len(ranges) < count and (length is None or cursor < length):
        stop = cursor + job.spec.split
        stop = stop if length is None else min(stop, length)
        ranges.append((cursor, stop))
        cursor = stop
    return ranges
