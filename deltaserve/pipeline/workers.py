"""Grain's worker processes: how they begin, that they end, and how a death is noticed."""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterator
from typing import Any

# What Grain says, and multiprocessing if it was in the middle of a message.
DIED = ("terminated unexpectedly", "got end of file during message")


def begin_worker(index: int, count: int) -> None:
    # Ctrl-C reaches the whole group; the consumer is the one to react, and tells the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()


def _end_with_parent() -> None:
    """A worker whose parent was killed must not wait for ever.

    Not by prctl's signal, which comes when the *thread* that started the worker ends: on every
    close, in the middle of a message, for the rest of which the consumer would wait.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def workers_of(iterator: Any) -> Iterator[Any]:
    """Grain's iterators over worker processes, as far as they have begun."""
    for each in getattr(iterator, "_iterators_in_use", ()):
        worker = getattr(each, "_maybe_nonnative_parent", None)
        if worker is not None:
            yield worker


def notice_deaths(iterator: Any) -> None:
    """Let the message of a worker that is killed in the middle of it end.

    Grain keeps open the end of the pipe that workers write to, and would wait for the rest.
    """
    for worker in workers_of(iterator):
        if not worker._buffer._writer.closed:
            worker._buffer._writer.close()
            worker._buffer.get = functools.partial(_received, worker._buffer.get)


def close_workers(iterator: Any) -> None:
    """Workers hold nothing that would be lost, and take long to end when asked: what they have
    made ahead must be taken first."""
    for worker in workers_of(iterator):
        if worker._buffer._writer.closed and worker._prefetch_process is not None:
            worker._prefetch_process.kill()
    iterator.close()


def _received(get: Any, block: bool = True, timeout: float | None = None) -> Any:
    try:
        return get(block, timeout)
    except (EOFError, OSError):
        # Grain then looks whether the worker is alive.
        raise queue.Empty from None
