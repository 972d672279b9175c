"""A consumer's grants, prepared by workers (its own host's first), in order."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from deltaserve.errors import ServiceError
from deltaserve.pipeline.segments import CHUNK, Done
from deltaserve.pipeline.service.demand import DemandMeter
from deltaserve.pipeline.service.dispatcher import Lease
from deltaserve.pipeline.service.ledger import JobSpec, Range
from deltaserve.pipeline.service.link import Link, WorkerLost
from deltaserve.pipeline.service.program import Lists, Program

# A range that killed so many workers is itself to blame.
MOST_DEATHS = 5
POLL_S = 0.2


@dataclass
class _Pending:
    range: Range
    future: Future[list[Done]] | None = None
    lease: Lease = field(default_factory=Lease)
    deaths: set[str] = field(default_factory=set)

    @property
    def local(self) -> bool:
        return self.future is not None and not self.lease.worker


class SplitReader:
    """place: the segment and its pass. reference: of the program, for workers. depth: ranges that
    are prepared at a time, or wait for their turn. local: threads of this process that prepare
    ranges; what they cannot, goes to workers of the service."""

    def __init__(
        self,
        link: Link,
        spec: JobSpec,
        consumer: int,
        program: Program,
        reference: tuple[str, Any],
        place: tuple[int, int],
        depth: int,
        local: int,
    ) -> None:
        self._link, self._spec, self._consumer = link, spec, consumer
        self._program, self._reference, self._place = program, reference, place
        self._depth = depth
        self._pending: dict[int, _Pending] = {}
        self._next: int | None = None  # the grant to start next; None until the first fetch
        self._ended = False
        self._ask_again = 0.0  # when there may be a worker again
        self._threads = local
        self._pool = ThreadPoolExecutor(local, "local worker") if local else None
        self._lists: Lists | None = None
        self._opening = threading.Lock()
        self.demand = DemandMeter(link, spec.name, consumer)
        self.lost_positions = 0

    def fetch(self, number: int) -> list[Done] | None:
        """What became of the lists of grant ``number``; None after the last.

        Raises:
            ServiceError: nobody prepared them within the patience. PipelineError: of the plan.
        """
        if self._next is None:
            self._next = number
        self._start(number)
        if number not in self._pending:
            return None
        began = time.monotonic()
        rows = self._wait(number)
        done = self._pending.pop(number).range
        self.demand.took(done[1] - done[0], time.monotonic() - began)
        return rows

    def close(self) -> None:
        self.demand.close()
        for pending in self._pending.values():
            if pending.future is not None:
                pending.future.cancel()
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    # ---- starting

    def _start(self, first: int) -> None:
        assert self._next is not None
        missing = first + self._depth - self._next
        # Asked for several at a time: each question is a write to the journal.
        if not self._ended and missing >= max(1, self._depth // 2):
            name, at = self._spec.name, self._next
            ranges = self._link.ask("grant", name, self._consumer, at, missing)
            self._ended = len(ranges) < missing
            for start, stop in ranges:
                self._pending[self._next] = _Pending((start, stop))
                self._next += 1
        for number, pending in self._pending.items():
            if pending.future is None:
                self._launch(number, pending, first)

    def _launch(self, number: int, pending: _Pending, done: int, failed: int = 0) -> None:
        if self._pool is not None:
            busy = sum(p.local and not p.future.done() for p in self._pending.values() if p.future)
            if busy < self._threads:
                pending.lease = Lease()
                pending.future = self._pool.submit(self._prepare, pending.range)
                return
        if time.monotonic() < self._ask_again:
            return
        pending.lease = self._link.ask(
            "lease", self._spec.name, self._consumer, number, done, failed, self._link.node
        )
        if not pending.lease.worker:
            self._ask_again = time.monotonic() + POLL_S
        else:
            pending.future = self._link.call(
                pending.lease.worker, "prepare", self._spec.name, self._reference, self._place,
                *pending.range,
            )  # fmt: skip

    def _prepare(self, turn: Range) -> list[Done]:
        with self._opening:
            self._lists = self._lists or Lists(self._program)
        began = time.perf_counter()
        rows = self._lists.run(self._place, *turn)
        seconds = max(time.perf_counter() - began, 1e-9)
        self.demand.local = self._threads * (turn[1] - turn[0]) / seconds
        return rows

    # ---- waiting

    def _wait(self, number: int) -> list[Done]:
        pending = self._pending[number]
        limit = time.monotonic() + self._link.patience_s
        while True:
            if pending.future is None:
                self._launch(number, pending, number)
            if pending.future is None:
                self._nobody(limit)
                continue
            try:
                return pending.future.result(timeout=self._link.patience_s)
            except WorkerLost as lost:
                pending.deaths.add(pending.lease.worker)
                if self._spec.relaxed:
                    self._link.ask("suspect", pending.lease.worker)
                    self.lost_positions += CHUNK * (pending.range[1] - pending.range[0])
                    return []
                if len(pending.deaths) >= MOST_DEATHS:
                    raise self._poison(pending, lost) from lost
                pending.future = None
                limit = time.monotonic() + self._link.patience_s
                self._launch(number, pending, number, failed=pending.lease.epoch)
            except concurrent.futures.TimeoutError:
                if self._alive(pending):
                    continue  # a long range
                pending.future = None
                self._launch(number, pending, number, failed=pending.lease.epoch)

    def _alive(self, pending: _Pending) -> bool:
        return pending.local or pending.lease.worker in self._link.ask("workers")

    def _nobody(self, limit: float) -> None:
        if time.monotonic() > limit:
            raise ServiceError(
                f"the service has had no worker for {self._link.patience_s:g} s, and job "
                f"'{self._spec.name}' none of its own (local=0); start workers, or raise the "
                "largest number of workers of the service above 0"
            )
        time.sleep(POLL_S)

    def _poison(self, pending: _Pending, lost: Exception) -> ServiceError:
        start, stop = pending.range
        return ServiceError(
            f"{MOST_DEATHS} workers died over positions {start * CHUNK} to {stop * CHUNK - 1} of "
            f"job '{self._spec.name}' (last: {lost}); look at these rows, or at the workers' memory"
        )
