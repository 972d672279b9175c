"""The engine in a process of its own, behind the client's verbs, and started again when it dies."""

from __future__ import annotations

import logging
import math
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar

from deltaserve.config import EngineConfig
from deltaserve.engine.frontend import CLOSED, Frontend
from deltaserve.engine.messages import (
    SCHEMA,
    Command,
    Failed,
    Hello,
    Loading,
    Ready,
    Registration,
    Report,
    Start,
    describe,
)
from deltaserve.engine.process import EngineProcess
from deltaserve.errors import DeltaServeError, EngineDeadError
from deltaserve.logs import logs_are_json

POLL_SECONDS = 0.1
"""How soon the end of the process, or a wish to close, is noticed."""
STOP_SECONDS = 2.0
"""What a step in progress may take when the engine is told to stop."""

ReportT = TypeVar("ReportT", bound=Report)

logger = logging.getLogger("deltaserve.engine")


@dataclass(frozen=True)
class Supervision:
    """When a process counts as dead, and what happens then.

    hang_seconds: without a sign of life while somebody waits. max_crashes: in a row, which a
    process ends that served for ``stable_seconds``; after so many it stays down. The first
    restart is immediate, the next ones wait ``backoff_seconds``, then twice as long each.
    spare_after_seconds: of serving, then a second process is kept that has imported everything and
    loaded nothing, so that a restart takes no longer than the model's loading; not at once,
    because its imports take seconds of a core when the first requests come.
    """

    hang_seconds: float = 300.0
    max_crashes: int = 5
    stable_seconds: float = 60.0
    backoff_seconds: float = 1.0
    spare_after_seconds: float = 20.0

    def delay(self, crashes: int) -> float:
        return 0.0 if crashes < 2 else self.backoff_seconds * 2.0 ** (crashes - 2)


class ProcessClient(Frontend):
    """An EngineClient. One thread starts the process, hears its reports and replaces it."""

    def __init__(self, config: EngineConfig, supervision: Supervision | None = None) -> None:
        """Load base and deltas, then serve. Blocks; raises DeltaServeError."""
        super().__init__(config)
        self._supervision = supervision or Supervision()
        self._process: EngineProcess | None = None
        self._spare: EngineProcess | None = None
        self._spare_due = math.inf
        self._crashes = 0
        self._given_up = False
        self._closing = threading.Event()
        self._close_reason = CLOSED
        self._started: Future[None] = Future()
        # Not the caller's thread: a process is killed when the *thread* that started it ends.
        self._thread = threading.Thread(target=self._run, name="deltaserve-engine", daemon=True)
        try:
            self._thread.start()
            self._started.result()
        except BaseException:  # Ctrl-C too
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        """Of the engine's process; None while there is none."""
        return None if self._process is None else self._process.pid

    def recovering(self) -> bool:
        return not (self.alive() or self._given_up)

    def close(self, reason: str = CLOSED) -> None:
        self._close_reason = reason
        self._closing.set()
        if self._thread.is_alive():  # unless its very start was interrupted
            self._thread.join()

    def _send(self, command: Command) -> None:
        assert self._process is not None, "only an engine that is up is sent to"
        self._process.send(command)

    def _run(self) -> None:
        try:
            while not self._given_up:
                if self._closing.wait(self._supervision.delay(self._crashes)):
                    return
                self._live()
        finally:
            if self._spare is not None:
                self._spare.stop(0)

    def _live(self) -> None:
        """One life of the process, from its start to its burial."""
        ready_at: float | None = None
        try:
            self._launch()
            ready_at = time.monotonic()
            while True:
                self._take(self._hear())
        except Exception as error:  # whatever it was, nobody may wait for ever
            served = 0.0 if ready_at is None else time.monotonic() - ready_at
            if self._closing.is_set():
                self._fail(self._close_reason)
            else:
                self._note_crash(error, served)
        finally:
            if self._process is not None:
                kindly = ready_at is not None and self._closing.is_set()
                self._process.stop(STOP_SECONDS if kindly else 0)
                self._process = None

    def _launch(self) -> None:
        """Start a process and wait until it serves. Raises what its engine raised."""
        self._spare_due = math.inf
        process = self._process = self._new_process()
        hello = self._expect(Hello)
        if hello.schema != SCHEMA:
            self._given_up = True
            raise EngineDeadError("the installed deltaserve has changed: restart the server")
        process.send(self._start_command(), wait=True)
        self._expect(Loading)
        process.hide()
        self._take(self._expect(Ready))
        self._spare_due = time.monotonic() + self._supervision.spare_after_seconds
        if not self._started.done():
            self._started.set_result(None)

    def _start_command(self) -> Start:
        """The first time the deltas of the configuration; then those that were served last."""
        level = logging.getLogger().getEffectiveLevel()
        if not self._started.done():
            return Start(self._config, (), level, logs_are_json())
        served = [
            Registration(info.name, info.path, info.pinned)
            for info in self.models()
            if info.parent is not None and info.state != "draining"
        ]
        config = replace(self._config, deltas=())
        return Start(config, tuple(served), level, logs_are_json())

    def _keep_spare(self) -> None:
        if time.monotonic() < self._spare_due:
            return
        self._spare_due = math.inf
        try:
            self._spare = EngineProcess(spare=True)
        except OSError as error:  # no reason to stop the one that serves
            logger.warning("no spare process can be kept: %s", error)

    def _new_process(self) -> EngineProcess:
        spare, self._spare = self._spare, None
        if spare is None:
            return EngineProcess()
        if spare.exit() is None:
            return spare
        spare.stop(0)
        return EngineProcess()

    def _expect(self, kind: type[ReportT]) -> ReportT:
        report = self._hear()
        assert isinstance(report, kind), f"{report} instead of {kind.__name__}"
        return report

    def _hear(self) -> Report:
        """The next report. Raises what ended the engine, if it gives none any more."""
        process, silent = self._process, 0.0
        assert process is not None
        while not self._closing.is_set():
            self._keep_spare()
            end = process.exit()  # before listening: its last words may still be on their way
            report = process.receive(POLL_SECONDS)
            if isinstance(report, Failed):
                raise report.failure.error()
            if report is not None:
                return report
            if end is not None:
                raise EngineDeadError(f"the engine's process {end}")
            # Counted, not read from the clock, which goes on while this process is stopped.
            silent = silent + POLL_SECONDS if self._busy() else 0.0
            if silent > self._supervision.hang_seconds:
                raise EngineDeadError(f"the engine gave no sign of life for {silent:.0f} s")
        raise EngineDeadError(CLOSED)

    def _note_crash(self, error: Exception, served: float) -> None:
        """Fail whoever waits, and decide whether there will be another life."""
        if not self._started.done():
            self._given_up = True
            self._started.set_exception(error)
            return
        self._crashes = 1 if served > self._supervision.stable_seconds else self._crashes + 1
        reason = str(error) if isinstance(error, DeltaServeError) else describe(error)
        self._given_up |= self._crashes >= self._supervision.max_crashes
        if self._given_up:
            reason += f"; it stays down after {self._crashes} in a row: restart the server"
        else:
            reason += "; it is being started again"
        logger.error("%s", reason)
        self._fail(reason)
