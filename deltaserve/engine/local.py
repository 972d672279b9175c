"""The engine in a thread of this process, behind the client's verbs."""

from __future__ import annotations

import logging
import threading
from collections import deque

import torch

from deltaserve.config import EngineConfig
from deltaserve.engine.core import Engine
from deltaserve.engine.frontend import CLOSED, Frontend
from deltaserve.engine.loop import EngineLoop
from deltaserve.engine.messages import Command, Ready, Report, Stop, describe

logger = logging.getLogger(__name__)


class LocalClient(Frontend):
    """An EngineClient. An engine that fails stays down."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.config)
        self._engine = engine
        self._commands: deque[Command] = deque()
        self._wake = threading.Condition()
        self._ready = threading.Event()
        self._num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="deltaserve-engine", daemon=True)
        self._thread.start()
        self._ready.wait()

    @classmethod
    def start(cls, config: EngineConfig) -> LocalClient:
        """Load base and deltas, then serve. Blocks; raises DeltaServeError."""
        return cls(Engine(config))

    def close(self, reason: str = CLOSED) -> None:
        self._fail(reason)
        self._send(Stop())
        self._thread.join()

    def _run(self) -> None:
        # A new thread would take over what the loading threads have set for themselves.
        torch.set_num_threads(self._num_threads)
        try:
            EngineLoop(self._engine, self._receive, self._take).run()
        except BaseException as error:  # whatever it was, nobody may wait for ever
            logger.exception("the engine failed")
            self._fail(f"the engine failed: {describe(error)}")
        finally:
            self._ready.set()

    def _take(self, report: Report) -> None:
        super()._take(report)
        if isinstance(report, Ready):
            self._ready.set()

    def _send(self, command: Command) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _receive(self, seconds: float | None) -> list[Command]:
        with self._wake:
            self._wake.wait_for(lambda: self._commands, seconds)
            commands = list(self._commands)
            self._commands.clear()
        return commands
