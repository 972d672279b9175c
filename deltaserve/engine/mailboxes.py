"""Where the events of each request go: a queue on the event loop of whoever submitted it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

from deltaserve.engine.types import FinishReason, TokenEvent
from deltaserve.errors import RequestError

logger = logging.getLogger(__name__)

Queue = asyncio.Queue[TokenEvent]


@dataclass(eq=False)
class Mailbox:
    """ended: its last event was delivered. left: nobody will listen (any more)."""

    loop: asyncio.AbstractEventLoop
    queue: Queue = field(default_factory=asyncio.Queue)
    ended: bool = False
    left: bool = False


class Mailboxes:
    """Open from a request's submission until its last event has been heard, or nobody listens.

    So an id is free again only when the engine has let go of it too. Events are delivered
    from any thread; the other methods belong to the event loops.
    """

    def __init__(self) -> None:
        self._open: dict[str, Mailbox] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, request_id: str) -> None:
        """Raises RequestError when the id is in use."""
        mailbox = Mailbox(asyncio.get_running_loop())
        with self._lock:
            if request_id in self._open:
                raise RequestError(f"request id {request_id!r} is in use")
            self._open[request_id] = mailbox

    def discard(self, request_id: str) -> None:
        """Forget a request that never reached the engine."""
        with self._lock:
            del self._open[request_id]

    def deliver(self, events: Iterable[TokenEvent]) -> None:
        """Hand over the events of a step, waking each event loop once."""
        letters: dict[asyncio.AbstractEventLoop, list[tuple[Queue, TokenEvent]]] = {}
        with self._lock:
            for event in events:
                mailbox = self._open.get(event.request_id)
                if mailbox is not None and not mailbox.ended:
                    letters.setdefault(mailbox.loop, []).append((mailbox.queue, event))
                    self._note_end(mailbox, event)
        for loop, batch in letters.items():
            try:
                loop.call_soon_threadsafe(_put_all, batch)
            except RuntimeError:  # the loop was closed: nobody waits any more
                logger.debug("dropped %d events: their event loop is closed", len(batch))

    def fail(self, reason: str) -> None:
        """End every request that has not ended."""
        with self._lock:
            waiting = [name for name, mailbox in self._open.items() if not mailbox.ended]
        self.deliver(TokenEvent(name, (), FinishReason.ERROR, reason) for name in waiting)

    def ended(self, request_id: str) -> bool:
        """Is there nothing left to abort? What has ended without being heard is forgotten."""
        with self._lock:
            mailbox = self._open.get(request_id)
            if mailbox is not None and mailbox.ended:
                del self._open[request_id]
            return mailbox is None or mailbox.ended

    async def listen(
        self, request_id: str, abort: Callable[[str], None]
    ) -> AsyncIterator[TokenEvent]:
        """Events until the last one. ``abort`` is called when the listener leaves earlier."""
        mailbox = self._open.get(request_id)
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
            if not self._leave(request_id, mailbox):
                abort(request_id)

    def _leave(self, request_id: str, mailbox: Mailbox) -> bool:
        """Stop listening; True if the request has ended."""
        with self._lock:
            mailbox.left = True
            if mailbox.ended and self._open.get(request_id) is mailbox:
                del self._open[request_id]
            return mailbox.ended

    def _note_end(self, mailbox: Mailbox, event: TokenEvent) -> None:
        if event.finish_reason is None:
            return
        mailbox.ended = True
        # Whoever still listens to what was aborted holds the mailbox; else nobody ever will.
        if mailbox.left or event.finish_reason is FinishReason.ABORT:
            del self._open[event.request_id]


def _put_all(letters: list[tuple[Queue, TokenEvent]]) -> None:
    for queue, event in letters:
        queue.put_nowait(event)
