"""Sends the sessions when they are due, and keeps what was measured whatever ends the run."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from deltaserve.bench.load.arrivals import Closed
from deltaserve.bench.load.client import Asker, Prompt
from deltaserve.bench.load.plan import Session
from deltaserve.bench.load.records import Outcome, Record
from deltaserve.bench.load.target import as_prompt, listens
from deltaserve.bench.load.workload import Tenant, Workload

LAG_PERIOD = 0.05
LISTEN_PERIOD = 0.2
RETRY_SECONDS = 0.1
"""What a user of a closed loop waits after a failure, so that refusals do not become a flood."""
PROGRESS_PERIOD = 0.5

COMPLETE, MAX_TIME = "complete", "max time"
INTERRUPTED, SERVER_DIED = "interrupted", "server died"


@dataclass
class Run:
    """What a run has measured so far. seconds: since its start, of a complete one to its last
    answer; lags: how late a timer of the client fired, every 50 ms; cpu_seconds: of the client."""

    records: list[Record] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    ended: str = COMPLETE
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    sent: int = 0
    in_flight: int = 0


class Runner:
    """One run of a workload. ``stop`` may be called at any time, from the event loop."""

    def __init__(
        self,
        make_client: Callable[[Callable[[], float]], Asker],
        workload: Workload,
        keys: Mapping[str, str],
        on_progress: Callable[[Run], None] = lambda run: None,
    ) -> None:
        """keys: tenant to API key. make_client gets the run's clock."""
        self.run = Run()
        self._client = make_client(self.clock)
        self._workload = workload
        self._keys = keys
        self._on_progress = on_progress
        self._time = asyncio.get_running_loop().time
        self._origin = self._time()
        self._stopped = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._error: BaseException | None = None
        self._claimed = 0
        self._watching = False
        slots = workload.max_concurrency
        self._slots = asyncio.Semaphore(slots) if slots else None

    def clock(self) -> float:
        """Seconds since the start; the loop's time is monotonic: nobody's clock setting matters."""
        return self._time() - self._origin

    def stop(self, why: str) -> None:
        if not self._stopped.is_set():
            self.run.ended = why
            self._stopped.set()

    async def execute(
        self, streams: Mapping[Tenant, Iterator[Session]], probes: Iterator[Session] | None = None
    ) -> Run:
        """Send everything, wait for the answers, or until ``stop`` or the time limit."""
        self._origin = self._time()
        cpu = time.process_time()
        feeders: list[asyncio.Future[None]] = [
            asyncio.ensure_future(feeder)
            for tenant, sessions in streams.items()
            for feeder in self._feeders(tenant, sessions)
        ]
        beside = [asyncio.ensure_future(self._measure_lag())]
        beside.append(asyncio.ensure_future(self._report_progress()))
        if probes is not None:
            beside.append(asyncio.ensure_future(self._feed(probes)))
        await self._until_over(feeders)
        self.run.seconds = self._end_of_load()
        await _end([*feeders, *beside])
        await _end(self._tasks)  # their records say that they were cut
        if self._error is not None:
            raise self._error
        self.run.cpu_seconds = time.process_time() - cpu
        self._on_progress(self.run)
        return self.run

    def _end_of_load(self) -> float:
        """Now, or at the last answer where nothing else was to come: what a user of a closed loop
        thinks after it, or whether the server still listens, is no part of the measured time."""
        if self.run.ended == COMPLETE:
            return max((r.finished for r in self.run.records if not r.probe), default=self.clock())
        return self.clock()

    async def _until_over(self, feeders: list[asyncio.Future[None]]) -> None:
        over = asyncio.ensure_future(self._finish(feeders))
        stopped = asyncio.ensure_future(self._stopped.wait())
        limit = self._workload.max_time
        await asyncio.wait({over, stopped}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if over.done():
            over.result()
        elif not stopped.done():
            self.stop(MAX_TIME)
        await _end([over, stopped])

    async def _finish(self, feeders: list[asyncio.Future[None]]) -> None:
        await asyncio.gather(*feeders)
        # Also whether the server is alive: one that died at the last requests has died too.
        while load := [task for task in self._tasks if task.get_name() in ("load", "watch")]:
            await asyncio.wait(load)

    def _feeders(
        self, tenant: Tenant, sessions: Iterator[Session]
    ) -> list[Coroutine[None, None, None]]:
        loop = tenant.arrivals
        if not isinstance(loop, Closed):
            return [self._feed(sessions)]
        gap = loop.ramp / loop.concurrency
        return [
            self._be_user(tenant, loop, sessions, tenant.start + number * gap)
            for number in range(loop.concurrency)
        ]

    async def _feed(self, sessions: Iterator[Session]) -> None:
        """An open loop: each session is made while the one before it is on its way."""
        for session in sessions:
            if not self._has_room(session):
                return
            await self._until(session.time)
            if not self._claim(session):
                return
            name = "probe" if session.probe else "load"
            self._start(self._converse(session), name)

    async def _be_user(
        self, tenant: Tenant, loop: Closed, sessions: Iterator[Session], begin: float
    ) -> None:
        """One user of a closed loop; all users of a tenant share its sessions."""
        await self._until(begin)
        end = tenant.start + (tenant.duration or float("inf"))
        pause = 0.0
        for session in sessions:
            if self.clock() + pause >= end or not self._has_room(session):
                return
            await asyncio.sleep(pause)
            if not self._claim(session):
                return
            good = await self._converse(dataclasses.replace(session, time=self.clock()))
            pause = loop.think if good else max(loop.think, RETRY_SECONDS)

    def _has_room(self, session: Session) -> bool:
        """Whether ``max_requests`` lets it be sent."""
        limit = self._workload.max_requests
        return session.probe or limit is None or self._claimed + len(session.turns) <= limit

    def _claim(self, session: Session) -> bool:
        """Take the room for it, if there still is any."""
        if not self._has_room(session):
            return False
        self._claimed += 0 if session.probe else len(session.turns)
        return True

    async def _converse(self, session: Session) -> bool:
        """All questions of a session. False when one failed, which ends it."""
        said: list[tuple[str, str]] = []
        scheduled = session.time
        for number, turn in enumerate(session.turns):
            await self._until(scheduled)
            record = Record(
                session.tenant,
                session.model,
                scheduled,
                scheduled,
                scheduled,
                Outcome.UNFINISHED,
                turn=number,
                probe=session.probe,
            )
            prompt = self._prompt(said, turn.prompt)
            record, text = await self._send(record, session, prompt, turn.output_tokens)
            if not record.ok:
                return not record.failed
            if isinstance(turn.prompt, str):
                said.append((turn.prompt, text))
            scheduled = record.finished + session.think
        return True

    async def _send(
        self, record: Record, session: Session, prompt: Prompt, output_tokens: int
    ) -> tuple[Record, str]:
        self.run.in_flight += 1
        try:
            if self._slots is not None and not session.probe:
                await self._slots.acquire()
            try:
                self.run.sent += not session.probe
                record, text = await self._client.ask(
                    record, prompt, output_tokens, self._keys[session.tenant], session.cancel_after
                )
            finally:
                if self._slots is not None and not session.probe:
                    self._slots.release()
        except asyncio.CancelledError:  # while it waited for its turn
            text = ""
            record = dataclasses.replace(record, sent=self.clock(), finished=self.clock())
        self.run.in_flight -= 1
        self.run.records.append(record)
        if record.outcome in (Outcome.CONNECT, Outcome.DISCONNECTED):
            self._watch()
        return record, text

    def _prompt(self, said: list[tuple[str, str]], question: str | list[int]) -> Prompt:
        if not said or not isinstance(question, str):
            return as_prompt(question, self._workload)
        if self._workload.endpoint == "completions":
            return "\n".join([*(f"{asked}\n{answer}" for asked, answer in said), question])
        messages: list[dict[str, str]] = []
        for asked, answer in said:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": question}]

    def _watch(self) -> None:
        """After a broken connection: is anybody still listening?"""
        if not self._watching:
            self._watching = True
            self._start(self._give_up_on_a_dead_server(), "watch")

    async def _give_up_on_a_dead_server(self) -> None:
        deadline = self.clock() + self._workload.give_up
        while self.clock() < deadline:
            if await listens(self._client.url):
                self._watching = False
                return
            await asyncio.sleep(LISTEN_PERIOD)
        self.stop(SERVER_DIED)

    def _start(self, work: Coroutine[None, None, Any], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = error
            self._stopped.set()

    async def _until(self, moment: float) -> None:
        await asyncio.sleep(max(0.0, moment - self.clock()))

    async def _measure_lag(self) -> None:
        while True:
            due = self.clock() + LAG_PERIOD
            await asyncio.sleep(LAG_PERIOD)
            self.run.lags.append(self.clock() - due)

    async def _report_progress(self) -> None:
        while True:
            self.run.seconds = self.clock()
            self._on_progress(self.run)
            await asyncio.sleep(PROGRESS_PERIOD)


async def _end(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel what still runs, and wait for it; a failure of one that had ended is raised."""
    pending = list(tasks)
    for task in pending:
        task.cancel()
    for result in await asyncio.gather(*pending, return_exceptions=True):
        if isinstance(result, Exception):
            raise result
