"""The life of an engine, in a thread or in a process: commands in, a step, reports out."""

from __future__ import annotations

import time
from collections.abc import Callable

from deltaserve.engine.core import Engine
from deltaserve.engine.messages import (
    Abort,
    Call,
    Command,
    Dump,
    Failure,
    ModelsChanged,
    Pin,
    Ready,
    Register,
    Reply,
    Report,
    Rollback,
    Start,
    Stepped,
    Stop,
    Submit,
    Unregister,
)
from deltaserve.engine.types import EngineRequest, FinishReason, TokenEvent
from deltaserve.errors import DeltaServeError

BEAT_SECONDS = 1.0
"""A busy engine that cannot run a step says so often."""
STATS_SECONDS = 0.1
"""Counters are sent so often while it runs, and whenever it comes to rest."""

Receive = Callable[[float | None], list[Command]]
"""All commands that have come; waits at most so many seconds for the first, None for ever."""


class EngineLoop:
    """Drives an engine. All of it happens in the thread that calls ``run``."""

    def __init__(self, engine: Engine, receive: Receive, send: Callable[[Report], None]) -> None:
        self._engine = engine
        self._receive = receive
        self._send = send
        self._events: list[TokenEvent] = []
        self._models_revision = engine.models_revision
        self._stalled = False
        self._sent_at = self._counted_at = 0.0

    def run(self) -> None:
        """Until Stop comes. What it raises is the end of this engine."""
        engine = self._engine
        try:
            self._send(Ready(engine.max_model_len, tuple(engine.models()), engine.stats()))
            while self._obey():
                self._step()
                self._report()
        finally:
            engine.close()

    def _obey(self) -> bool:
        """Carry out what has come; False once it shall stop. Waits only with nothing to do."""
        for command in self._receive(0.0 if self._engine.has_work() else None):
            match command:
                case Submit(request):
                    self._submit(request)
                case Abort(request_id):
                    event = self._engine.abort(request_id)
                    self._events += [] if event is None else [event]
                case Stop():
                    return False
                case Start():
                    raise AssertionError("an engine is started once")
                case _:
                    self._answer(command)
        return True

    def _submit(self, request: EngineRequest) -> None:
        """What was right when it was sent may be wrong by now: its delta may be gone."""
        try:
            self._engine.add(request)
        except DeltaServeError as error:
            failed = TokenEvent(request.request_id, (), FinishReason.ERROR, str(error))
            self._events.append(failed)

    def _answer(self, call: Call) -> None:
        try:
            reply = Reply(call.call, result=self._manage(call))
        except DeltaServeError as error:
            reply = Reply(call.call, Failure.of(error))
        self._report_models()  # first, so that who gets the reply knows what it changed
        self._send(reply)

    def _manage(self, call: Call) -> object:
        engine = self._engine
        match call:
            case Register():
                return engine.register(call.name, call.path, call.pinned)
            case Unregister():
                engine.unregister(call.name)
            case Pin():
                engine.pin(call.name, call.pinned)
            case Rollback():
                engine.rollback(call.name)
            case Dump():
                return engine.dump()
        return None

    def _step(self) -> None:
        before = self._engine.counters.steps
        self._events += self._engine.step()
        self._stalled = self._engine.counters.steps == before

    def _report(self) -> None:
        self._report_models()
        now, idle = time.monotonic(), not self._engine.has_work()
        if self._stalled and not (self._events or idle or now - self._sent_at >= BEAT_SECONDS):
            return
        counted = idle or now - self._counted_at >= STATS_SECONDS
        self._send(Stepped(tuple(self._events), self._engine.stats() if counted else None))
        self._events.clear()
        self._sent_at = now
        self._counted_at = now if counted else self._counted_at

    def _report_models(self) -> None:
        if self._models_revision != self._engine.models_revision:
            self._models_revision = self._engine.models_revision
            self._send(ModelsChanged(tuple(self._engine.models())))
