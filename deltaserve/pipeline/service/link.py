"""How consumers reach the dispatcher and the workers. Ray is one such link (see cluster.py)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol


class WorkerLost(Exception):  # noqa: N818 - it is expected, and handled
    """A worker died, or cannot be reached. What it was asked for must be asked of another."""


class Link(Protocol):
    node: str
    """Where this process runs; workers may run there too."""
    patience_s: float
    """How long to wait for a dispatcher or a worker that is not there, before it is an error."""

    def ask(self, command: str, *args: Any, patience_s: float | None = None) -> Any:
        """A command of the dispatcher. It is repeated while the dispatcher is being restarted.

        Raises:
            ServiceError: no answer within the patience; or the dispatcher's own.
        """

    def call(self, worker: str, method: str, *args: Any) -> Future[Any]:
        """A method of a worker. The result raises WorkerLost, or what the method raised."""

    def share(self, value: Any) -> Any:
        """A reference to a value (a program, elements) that many can open; sent once to each
        machine."""

    def open(self, shared: Any) -> Any:
        """The value. Raises WorkerLost: it went with the process that shared it."""


def within(limit_s: float, call: Callable[[], Any]) -> Any:
    """What a call gives. Raises ConnectionError: nothing in this time; its thread is left."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return result.result(limit_s)
    except TimeoutError:
        raise ConnectionError(f"no answer for {limit_s:g} s") from None
