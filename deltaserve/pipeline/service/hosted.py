"""Elements of streams that workers host: shared ones, and rounds."""

from __future__ import annotations

import pickle
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from typing import Any

from deltaserve.errors import ServiceError
from deltaserve.pipeline.service.demand import DemandMeter
from deltaserve.pipeline.service.dispatcher import Place
from deltaserve.pipeline.service.ledger import JobSpec
from deltaserve.pipeline.service.link import Link, WorkerLost
from deltaserve.pipeline.service.program import Program
from deltaserve.pipeline.service.shared import Chunk

# Elements that are fetched at a time; the next are asked for while these are used.
CHUNK = 8
WAIT_S = 1.0
POLL_S = 0.2
# A host answers after WAIT_S, if only that there is nothing yet.
ANSWER_S = 10.0


class Lane:
    """The elements of one producer, in order. peers_limit_s: how long to wait for other
    consumers."""

    def __init__(
        self,
        link: Link,
        spec: JobSpec,
        consumer: int,
        reference: tuple[str, Any],
        producer: int,
        peers_limit_s: float,
    ) -> None:
        self._link, self._spec, self._consumer = link, spec, consumer
        self._reference, self._producer = reference, producer
        self._peers_limit_s = peers_limit_s
        self._place = Place("", 0, 0)
        self._greeted = 0  # the last epoch under which a host answered
        self._items: deque[Any] = deque()
        self._asked: Future[Chunk] | None = None
        self._ask_again = 0.0  # when there may be a worker again
        self.index = 0
        self.skipped = 0

    def seek(self, index: int) -> None:
        self._items.clear()
        self._asked = None
        self.index = index

    def next(self) -> tuple[bool, Any]:
        """The next element, and whether there is one."""
        if not self._items and not self._receive():
            return False, None
        packed = self._items.popleft()
        self.index += 1
        few = len(self._items) < CHUNK // 2
        if few and self._asked is None and time.monotonic() > self._ask_again:
            self._ask(self.index + len(self._items))
        return True, pickle.loads(packed)

    # ---- receiving

    def _receive(self) -> bool:
        began = time.monotonic()
        failed = 0
        while True:
            if self._asked is None and not self._ask(self.index, failed):
                self._nobody(began)
                continue
            chunk = self._result()
            if chunk is None:  # the host is gone, or does not answer
                failed, self._place = self._place.epoch, Place("", 0, 0)
            elif chunk.items or chunk.shared is not None:
                self.skipped += chunk.first - self.index
                self.index = chunk.first
                self._items.extend(chunk.items)
                return True
            elif chunk.ended:
                return False
            else:
                # Perhaps the others have moved to another host.
                failed, self._place = 0, Place("", 0, 0)
                if chunk.waits_for:
                    self._blocked(began, chunk.waits_for)
                else:
                    began = time.monotonic()

    def _ask(self, index: int, failed: int = 0) -> bool:
        """Ask for the elements from ``index`` on. False: nobody hosts them."""
        if not self._place.worker or index >= self._place.until:
            self._place = self._link.ask("locate", self._spec.name, self._producer, index, failed)
            if not self._place.worker:
                self._ask_again = time.monotonic() + POLL_S
                return False
        place = (self._producer, self._place.epoch)
        # Up to the same elements for all, so that they can be sent the same.
        count = min(CHUNK - index % CHUNK, self._place.until - index)
        # A host needs the program once.
        reference = self._reference if self._greeted != self._place.epoch else None
        request = (self._spec, reference, place, self._consumer, index, count, WAIT_S)
        self._asked = self._link.call(self._place.worker, "read", *request)
        return True

    def _result(self) -> Chunk | None:
        asked, self._asked = self._asked, None
        assert asked is not None
        try:
            chunk = asked.result(timeout=ANSWER_S)
            self._greeted = self._place.epoch
            shared = chunk.shared
            return chunk if shared is None else replace(chunk, items=self._link.open(shared))
        except (WorkerLost, FutureTimeoutError):
            return None

    # ---- giving up

    def _nobody(self, began: float) -> None:
        if time.monotonic() - began > self._link.patience_s:
            raise ServiceError(
                f"the service has had no worker for {self._link.patience_s:g} s, and job "
                f"'{self._spec.name}' needs one; start workers"
            )
        time.sleep(POLL_S)

    def _blocked(self, began: float, waits_for: Any) -> None:
        others = [consumer for consumer in waits_for if consumer != self._consumer]
        if others and time.monotonic() - began > self._peers_limit_s:
            shown = ", ".join(map(str, others))
            raise ServiceError(
                f"job '{self._spec.name}' waits for consumer {shown}, which took nothing for "
                f"{self._peers_limit_s:g} s; start it again, or use mode 'window', in which "
                "nobody waits"
            )


class HostedReader:
    """All producers' elements in turn; one that has ended is passed over."""

    def __init__(
        self, link: Link, spec: JobSpec, consumer: int, program: Program, peers_limit_s: float
    ) -> None:
        reference = (program.stream, link.share(program))
        self._lanes = [
            Lane(link, spec, consumer, reference, producer, peers_limit_s)
            for producer in range(spec.producers)
        ]
        self._ended = [False] * spec.producers
        self._turn = 0
        self.demand = DemandMeter(link, spec.name, consumer)

    @property
    def taken(self) -> int:
        """The number of the next element, of all producers."""
        return sum(lane.index for lane in self._lanes)

    @property
    def skipped(self) -> int:
        return sum(lane.skipped for lane in self._lanes)

    def __next__(self) -> Any:
        while not all(self._ended):
            turn = self._turn
            self._turn = (turn + 1) % len(self._lanes)
            if self._ended[turn]:
                continue
            began = time.monotonic()
            there, element = self._lanes[turn].next()
            if there:
                self.demand.took(1, time.monotonic() - began)
                return element
            self._ended[turn] = True
        raise StopIteration

    def get_state(self) -> dict[str, Any]:
        lanes = [lane.index for lane in self._lanes]
        return {"lanes": lanes, "ended": list(self._ended), "turn": self._turn}

    def set_state(self, state: Mapping[str, Any]) -> None:
        for lane, index in zip(self._lanes, state["lanes"], strict=True):
            lane.seek(index)
        self._ended, self._turn = list(state["ended"]), state["turn"]

    def close(self) -> None:
        self.demand.close()
