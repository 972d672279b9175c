"""What a consumer would take if it never had to wait, told to the dispatcher every second."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

from deltaserve.errors import ServiceError
from deltaserve.pipeline.service.link import Link

EVERY_S = 1.0


class DemandMeter:
    """``took`` counts what was taken, and how long that was waited for. A thread reports until
    ``close``. local: what the consumer's own host prepares in a second."""

    def __init__(self, link: Link, job: str, consumer: int) -> None:
        self._link, self._key = link, (job, consumer)
        self._lock = threading.Lock()
        self._taken, self._waited, self._since = 0, 0.0, time.monotonic()
        self._wanted = 0.0
        self.local = 0.0
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="demand", daemon=True).start()

    def took(self, count: int, waited: float) -> None:
        with self._lock:
            self._taken += count
            self._waited += waited

    def close(self) -> None:
        if not self._stopped.is_set():
            self._stopped.set()
            self._tell("withdraw")

    def _run(self) -> None:
        while not self._stopped.wait(EVERY_S):
            self._tell("report", self._measure(), self.local, self._link.node)

    def _measure(self) -> float:
        """In a second in which nothing was taken (a long step, or nothing came) it stays."""
        with self._lock:
            now = time.monotonic()
            if self._taken:
                busy = max(now - self._since - self._waited, 1e-3)
                self._wanted = self._taken / busy
                self._taken, self._waited, self._since = 0, 0.0, now
            elif self._wanted == 0.0:
                self._wanted = 1.0  # it waits for its first: somebody is to begin
            return self._wanted

    def _tell(self, command: str, *args: Any) -> None:
        # It is told again; and a consumer that is silent wants nothing.
        with contextlib.suppress(ServiceError):
            self._link.ask(command, *self._key, *args, patience_s=0)
