"""One engine of a simulated installation, and what a client gets from it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from deltaserve.bench.simulate.engine import SimulatedEngine
from deltaserve.bench.simulate.system import System
from deltaserve.bench.simulate.virtual import StepClock
from deltaserve.engine.core import LOAD_WAIT_S
from deltaserve.engine.types import EngineRequest, FinishReason, TokenEvent
from deltaserve.errors import DeltaServeError


@dataclass
class Ticket:
    """A request on its way: its tokens and when each came, by the loop's time."""

    ended: asyncio.Future[None]
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    num_cached: int = 0
    error: Exception | str | None = None


class Replica:
    """Does what ``EngineLoop`` does: commands, a step, its events, again."""

    def __init__(self, system: System, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._clock = StepClock(loop)
        self.engine = SimulatedEngine(system, self._clock)
        self._between = system.between_s
        self._inbox: deque[EngineRequest | str] = deque()
        self._wake = asyncio.Event()
        self._tickets: dict[str, Ticket] = {}

    @property
    def load(self) -> int:
        """Requests that were given to it and have not ended."""
        return len(self._tickets)

    def submit(self, request: EngineRequest) -> Ticket:
        ticket = self._tickets[request.request_id] = Ticket(self._loop.create_future())
        self._inbox.append(request)
        self._wake.set()
        return ticket

    def abort(self, request_id: str) -> None:
        if self._tickets.pop(request_id, None) is not None:
            self._inbox.append(request_id)
            self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._obey()
            if not self.engine.has_work():
                self._wake.clear()
                await self._wake.wait()
                continue
            before, steps = self._clock(), self.engine.counters.steps
            events = self.engine.step()
            if self.engine.counters.steps > steps:
                self._clock.pass_time(self._between)
            elif not events and self._clock() == before:
                self._clock.pass_time(LOAD_WAIT_S)  # nothing can run yet, not even a load
            await self._clock.caught_up()
            self._tell(events)

    def _obey(self) -> None:
        while self._inbox:
            command = self._inbox.popleft()
            if isinstance(command, str):
                self.engine.abort(command)
                continue
            try:
                self.engine.check(command)
                self.engine.add(command)
            except DeltaServeError as error:
                self._end(command.request_id, error)

    def _tell(self, events: list[TokenEvent]) -> None:
        now = self._loop.time()
        for event in events:
            ticket = self._tickets.get(event.request_id)
            if ticket is None:  # its client has gone
                continue
            ticket.tokens += event.token_ids
            ticket.times += [now] * len(event.token_ids)
            ticket.num_cached = event.num_cached
            if event.finish_reason is not None:
                failed = event.finish_reason is FinishReason.ERROR
                self._end(event.request_id, event.error if failed else None)

    def _end(self, request_id: str, error: Exception | str | None) -> None:
        ticket = self._tickets.pop(request_id, None)
        if ticket is not None:
            ticket.error = error
            if not ticket.ended.done():
                ticket.ended.set_result(None)
