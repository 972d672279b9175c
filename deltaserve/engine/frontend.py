"""The half of a client that is the same wherever the engine runs."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

from deltaserve.config import EngineConfig
from deltaserve.engine.checks import check_request
from deltaserve.engine.gate import QueueGate
from deltaserve.engine.mailboxes import Mailboxes
from deltaserve.engine.messages import (
    Abort,
    Call,
    Command,
    Dump,
    ModelsChanged,
    Pin,
    Ready,
    Register,
    Reply,
    Report,
    Rollback,
    Stepped,
    Submit,
    Unregister,
)
from deltaserve.engine.types import EngineRequest, EngineStats, ModelInfo, TokenEvent
from deltaserve.errors import ArtifactError, EngineDeadError, UnknownModelError

CLOSED = "the engine was shut down"


class Frontend(ABC):
    """An EngineClient but for its transport: ``_send`` takes commands, ``_take`` reports.

    It answers from what the engine last reported, so that no verb but the management ones waits
    for the engine.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._mailboxes = Mailboxes()
        self._models: dict[str, ModelInfo] = {}
        self._max_model_len = 0
        self._stats: EngineStats
        self._lock = threading.Lock()
        """Guards the gate, and the passage from up to down: nothing is sent to what is gone."""
        self._gate = self._new_gate()
        self._down: str | None = "the engine is loading"
        self._numbers = itertools.count(1)
        self._calls: dict[int, Future[Reply]] = {}
        self._changed: Future[None] = Future()
        """Done, and replaced, whenever the models change."""

    @abstractmethod
    def _send(self, command: Command) -> None:
        """Pass on to the engine, without waiting."""

    @abstractmethod
    def close(self, reason: str = CLOSED) -> None:
        """Stop the engine and wait for it."""

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    def models(self) -> list[ModelInfo]:
        return list(self._models.values())

    def stats(self) -> EngineStats:
        return self._stats

    def alive(self) -> bool:
        return self._down is None

    def recovering(self) -> bool:
        return False

    def submit(self, request: EngineRequest) -> None:
        with self._lock:
            self._require_up()
            vocab_size = self._model(request.model).vocab_size
            check_request(request, vocab_size, self._max_model_len)
            self._gate.check(request, time.monotonic())
            self._mailboxes.open(request.request_id)
            try:
                self._send(Submit(request))
            except BaseException:
                self._mailboxes.discard(request.request_id)
                raise
            self._gate.enter(request)

    def stream(self, request_id: str) -> AsyncIterator[TokenEvent]:
        return self._mailboxes.listen(request_id, self.abort)

    def abort(self, request_id: str) -> None:
        if not self._mailboxes.ended(request_id):
            with self._lock:
                if self._down is None:
                    self._send(Abort(request_id))

    async def load_delta(self, name: str, path: str, pinned: bool = False) -> ModelInfo:
        number = await self._call(lambda call: Register(call, name, path, pinned))
        while True:
            changed = self._changed  # before looking, so that no change is missed
            info = self._model(name)
            if info.error is not None:
                raise ArtifactError(info.error)
            if info.version >= number and info.state == "ready":
                return info
            await asyncio.shield(asyncio.wrap_future(changed))

    async def unload_delta(self, name: str) -> None:
        await self._call(lambda call: Unregister(call, name))
        while True:
            changed = self._changed
            if name not in self._models or self._models[name].state != "draining":
                return
            await asyncio.shield(asyncio.wrap_future(changed))

    async def pin_delta(self, name: str, pinned: bool) -> None:
        await self._call(lambda call: Pin(call, name, pinned))

    async def rollback_delta(self, name: str) -> None:
        await self._call(lambda call: Rollback(call, name))

    async def dump(self) -> dict[str, Any]:
        state: dict[str, Any] = await self._call(Dump)
        return state

    async def _call(self, make: Callable[[int], Call]) -> Any:
        """Send a management command -> its result. Raises the engine's refusal."""
        number, waiting = next(self._numbers), Future[Reply]()
        with self._lock:
            self._require_up()
            self._calls[number] = waiting
            try:
                self._send(make(number))
            except BaseException:
                del self._calls[number]
                raise
        reply = await asyncio.wrap_future(waiting)
        if reply.failure is not None:
            raise reply.failure.error()
        return reply.result

    def _model(self, name: str) -> ModelInfo:
        info = self._models.get(name)
        if info is None or info.state == "draining":
            raise UnknownModelError(
                f"the model {name!r} does not exist; GET /v1/models lists those that do",
                param="model",
            )
        return info

    def _require_up(self) -> None:
        if self._down is not None:
            raise EngineDeadError(self._down)

    def _busy(self) -> bool:
        """Does anybody wait for the engine?"""
        return bool(self._calls) or len(self._mailboxes) > 0

    def _take(self, report: Report) -> None:
        """Act on a report; called in one thread, which is not that of the event loops."""
        match report:
            case Stepped(events, stats):
                self._stats = stats or self._stats
                self._count(events)
                self._mailboxes.deliver(events)
            case ModelsChanged(models):
                self._set_models(models)
            case Reply(call):
                waiting = self._calls.pop(call)
                if waiting.set_running_or_notify_cancel():
                    waiting.set_result(report)
            case Ready():
                self._max_model_len, self._stats = report.max_model_len, report.stats
                self._set_models(report.models)
                self._down = None

    def _count(self, events: tuple[TokenEvent, ...]) -> None:
        """Whoever has an event waits no more."""
        now = time.monotonic()
        with self._lock:
            for event in events:
                if event.token_ids:
                    self._gate.admit(event.request_id, now)
                else:
                    self._gate.leave(event.request_id)

    def _new_gate(self) -> QueueGate:
        return QueueGate(self._config.max_queued_requests, self._config.max_queued_tokens)

    def _set_models(self, models: tuple[ModelInfo, ...]) -> None:
        self._models = {info.name: info for info in models}
        changed, self._changed = self._changed, Future()
        changed.set_result(None)

    def _fail(self, reason: str) -> None:
        """The engine is down: whoever waits for it learns why, and nobody else may begin."""
        with self._lock:
            self._down = reason
            self._gate = self._new_gate()
            calls, self._calls = self._calls, {}
            changed, self._changed = self._changed, Future()
        self._mailboxes.fail(reason)
        for waiting in calls.values():
            if waiting.set_running_or_notify_cancel():
                waiting.set_exception(EngineDeadError(reason))
        changed.set_exception(EngineDeadError(reason))
