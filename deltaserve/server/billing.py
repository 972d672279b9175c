"""What one generation costs its tenant: set aside before it begins, recorded before it ends."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal

from starlette.requests import Request

from deltaserve.engine.types import ModelInfo
from deltaserve.server.auth import caller_of, ticket_of
from deltaserve.tenancy.limits import Ticket
from deltaserve.tenancy.usage import UsageLog, UsageRecord

MAX_END_USER = 256
"""Characters of ``user`` that are kept."""

Outcome = Literal["ok", "error", "cancelled"]


@dataclass(frozen=True, slots=True)
class Used:
    """Tokens of one HTTP request; a prompt counts once, however many choices are made of it."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Bill:
    """Of one generation of a tenant. ``pay``, ``drop`` or ``void`` ends it, once."""

    def __init__(self, usage: UsageLog, ticket: Ticket, record: UsageRecord) -> None:
        """``record``: what is known before the end."""
        self._usage = usage
        self._ticket = ticket
        self._record = record
        self._open = True

    async def pay(self, used: Used) -> None:
        """Returns when the record is on the disk. Raises AccountingError if it cannot be."""
        if self._open:
            await asyncio.wrap_future(self._close("ok", used))

    def drop(self, outcome: Outcome, used: Used) -> None:
        """The answer ended early: nobody waits for the record, which is written all the same."""
        if self._open:
            self._close(outcome, used)

    def void(self) -> None:
        """The engine did not take the request: it has used nothing, and leaves no record."""
        self._open = False
        self._ticket.settle(0)

    def _close(self, outcome: Outcome, used: Used) -> Future[None]:
        self._open = False
        self._ticket.settle(used.prompt_tokens + used.completion_tokens)
        return self._usage.write(
            replace(
                self._record,
                finished=time.time(),
                outcome=outcome,
                prompt_tokens=used.prompt_tokens,
                cached_tokens=used.cached_tokens,
                completion_tokens=used.completion_tokens,
            )
        )


def open_bill(
    request: Request, usage: UsageLog, model: ModelInfo, end_user: str | None, tokens: int
) -> Bill | None:
    """Set ``tokens`` aside for a tenant's request. None for one that nobody pays for.

    Raises LimitError.
    """
    caller, ticket = caller_of(request), ticket_of(request)
    if caller is None or ticket is None:
        return None
    ticket.reserve(tokens)
    record = UsageRecord(
        request_id=request.state.request_id,
        created=ticket.at,
        finished=ticket.at,
        tenant=caller.tenant.id,
        key=caller.key.id,
        end_user=None if end_user is None else end_user[:MAX_END_USER],
        model=model.name,
        digest=model.digest,
        endpoint=request.url.path,
        outcome="error",
        prompt_tokens=0,
        cached_tokens=0,
        completion_tokens=0,
    )
    return Bill(usage, ticket, record)
