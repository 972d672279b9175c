"""The engine in a thread of this process, behind the client's verbs."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from deltaserve.config import EngineConfig
from deltaserve.engine.core import Engine
from deltaserve.engine.gate import QueueGate
from deltaserve.engine.types import (
    EngineRequest,
    EngineStats,
    FinishReason,
    ModelInfo,
    TokenEvent,
)
from deltaserve.errors import EngineDeadError, RequestError

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Mailbox:
    """Where the events of one request go: a queue on its submitter's event loop."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[TokenEvent] = field(default_factory=asyncio.Queue)

    def post(self, event: TokenEvent) -> None:
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, event)
        except RuntimeError:  # the loop was closed: nobody waits any more
            logger.debug("dropped an event of %s: its event loop is closed", event.request_id)


class LocalClient:
    """An EngineClient. Submissions and aborts reach the engine between two steps."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._models = engine.models()
        config = engine.config
        self._gate = QueueGate(config.max_queued_requests, config.max_queued_tokens)
        self._wake = threading.Condition()
        self._submitted: deque[EngineRequest] = deque()
        self._aborted: deque[str] = deque()
        self._mailboxes: dict[str, Mailbox] = {}
        self._failure: str | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="deltaserve-engine", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, config: EngineConfig) -> LocalClient:
        """Load base and deltas, then serve. Blocks; raises DeltaServeError."""
        return cls(Engine(config))

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    def models(self) -> list[ModelInfo]:
        return self._models

    def submit(self, request: EngineRequest) -> None:
        self._engine.check(request)
        mailbox = Mailbox(asyncio.get_running_loop())
        with self._wake:
            if self._failure is not None or self._closing:
                raise EngineDeadError(self._failure or "the engine is shutting down")
            if request.request_id in self._mailboxes:
                raise RequestError(f"request id {request.request_id!r} is in use")
            self._gate.check(request, time.monotonic())
            self._gate.enter(request)
            self._mailboxes[request.request_id] = mailbox
            self._submitted.append(request)
            self._wake.notify()

    async def stream(self, request_id: str) -> AsyncIterator[TokenEvent]:
        mailbox = self._mailboxes.get(request_id)
        if mailbox is None:  # aborted before anybody listened
            yield TokenEvent(request_id, (), FinishReason.ABORT)
            return
        try:
            while True:
                event = await mailbox.queue.get()
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self.abort(request_id)
            self._mailboxes.pop(request_id, None)

    def abort(self, request_id: str) -> None:
        with self._wake:
            self._aborted.append(request_id)
            self._wake.notify()

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def alive(self) -> bool:
        return self._failure is None and not self._closing

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._take_requests()
                self._publish(self._engine.step())
        except BaseException as error:  # whatever it was, nobody may wait for ever
            logger.exception("the engine failed")
            self._fail_all(f"the engine failed: {type(error).__name__}: {error}")
        else:
            self._fail_all("the engine was shut down")

    def _wait_for_work(self) -> bool:
        """False once the engine shall stop."""
        with self._wake:
            while not (
                self._closing or self._submitted or self._aborted or self._engine.has_work()
            ):
                self._wake.wait()
            return not self._closing

    def _take_requests(self) -> None:
        with self._wake:
            submitted, self._submitted = self._submitted, deque()
            aborted, self._aborted = self._aborted, deque()
        for request in submitted:
            try:
                self._engine.add(request)
            except RequestError as error:  # right when it was submitted, but no longer
                name = request.request_id
                self._publish([TokenEvent(name, (), FinishReason.ERROR, str(error))])
        for request_id in aborted:
            event = self._engine.abort(request_id)
            if event is not None:
                self._publish([event])

    def _publish(self, events: list[TokenEvent]) -> None:
        self._count(events)
        for event in events:
            mailbox = self._mailboxes.get(event.request_id)
            if mailbox is not None:
                mailbox.post(event)
            if event.finish_reason is FinishReason.ABORT:
                # Its stream, if there is one, holds the mailbox itself; else nobody ever will.
                self._mailboxes.pop(event.request_id, None)

    def _count(self, events: list[TokenEvent]) -> None:
        """Whoever has an event waits no more."""
        now = time.monotonic()
        with self._wake:
            for event in events:
                if event.token_ids:
                    self._gate.admit(event.request_id, now)
                else:
                    self._gate.leave(event.request_id)

    def _fail_all(self, reason: str) -> None:
        with self._wake:
            self._failure = reason
            waiting = dict(self._mailboxes)
        for request_id, mailbox in waiting.items():
            mailbox.post(TokenEvent(request_id, (), FinishReason.ERROR, reason))
