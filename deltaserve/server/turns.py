"""Work beside the event loop, shared out: nobody's long prompts keep another tenant's waiting.

Each tenant has a few pieces of work in the threads, and the rest of his waits in his own line. So
whoever comes waits behind a few pieces of each tenant, however many one of them has sent; and what
is small does not wait behind what is large at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

from starlette.requests import Request

from deltaserve.server.auth import caller_of

T = TypeVar("T")

LARGE_BYTES = 2**16
"""Of a request's body. Tokenising it takes longer than most answers wait for their first token."""
AT_A_TIME = 2
"""Pieces of work of one tenant in the threads, of each size."""


class Turns:
    """The threads. They belong to one event loop."""

    def __init__(self) -> None:
        threads = min(32, (os.cpu_count() or 1) + 4)  # as asyncio has
        self._small = ThreadPoolExecutor(threads, "small")
        self._large = ThreadPoolExecutor(threads, "large")
        self._lines: dict[tuple[str, bool], asyncio.Semaphore] = {}

    async def run(self, work: Callable[[], T], tenant: str | None, size: int) -> T:
        """What ``work`` returns or raises. tenant: None waits for nobody. size: bytes."""
        large = size > LARGE_BYTES
        loop = asyncio.get_running_loop()
        line = None
        if tenant is not None:
            line = self._lines.setdefault((tenant, large), asyncio.Semaphore(AT_A_TIME))
            await line.acquire()
        pool = self._large if large else self._small
        future = pool.submit(contextvars.copy_context().run, work)
        if line is not None:
            release = line.release

            def ended(_: object) -> None:
                # Only now: who does not wait for the result still keeps a thread busy.
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(release)

            future.add_done_callback(ended)
        return await asyncio.wrap_future(future)


async def in_turn(request: Request, work: Callable[[], T]) -> T:
    """Run in a thread what a request, whose body has been read, asks for."""
    caller, turns = caller_of(request), cast("Turns", request.app.state.turns)
    tenant = None if caller is None else caller.tenant.id
    return await turns.run(work, tenant, request.state.body_bytes)
