"""What was used: one durable record for each finished request, and sums of them.

Records are written by a thread, as many in one transaction as have come meanwhile, so a commit's
wait for the disk is shared by the requests that end during the one before, and the event loop
never waits.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from deltaserve.database import open_database, transaction
from deltaserve.errors import AccountingError, RequestError
from deltaserve.tenancy.limits import period_of
from deltaserve.tenancy.schema import MIGRATIONS

logger = logging.getLogger(__name__)

MAX_BATCH = 1000
GROUPS = ("day", "tenant", "key", "model")
SUMS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One finished request. Times are Unix seconds; ``created`` decides the day it counts for."""

    request_id: str
    created: float
    finished: float
    tenant: str
    key: str
    """The key's id."""
    end_user: str | None
    """The request's ``user``: a customer of the tenant."""
    model: str
    digest: str | None
    """Of the version that answered; the base has none."""
    endpoint: str
    outcome: str
    """``ok``, ``error``, or ``cancelled`` by the client."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


_COLUMNS = [column.name for column in fields(UsageRecord)]
_INSERT = (
    f"INSERT INTO usage (day, {', '.join(_COLUMNS)}) VALUES (?, {', '.join('?' for _ in _COLUMNS)})"
)
_ADD = f"""INSERT INTO usage_by_day ({", ".join(GROUPS + SUMS)}) VALUES (?, ?, ?, ?, 1, ?, ?, ?)
    ON CONFLICT DO UPDATE SET {", ".join(f"{name} = {name} + excluded.{name}" for name in SUMS)}"""


class UsageLog:
    """Writes records. ``close`` waits until all of them are on the disk."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError when the database cannot be used."""
        self.path = path
        self._connection = open_database(path, MIGRATIONS)
        self._queue: queue.SimpleQueue[tuple[UsageRecord, Future[None]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="deltaserve-usage", daemon=True)
        self._thread.start()

    def write(self, record: UsageRecord) -> Future[None]:
        """Done once the record is durable; AccountingError if it could not be written.

        It is written even if nobody waits. On an event loop: ``asyncio.wrap_future``.
        """
        written: Future[None] = Future()
        written.set_running_or_notify_cancel()  # a waiter that is cancelled does not cancel it
        self._queue.put((record, written))
        return written

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        closing = False
        while not closing:
            items = [self._queue.get()]
            while len(items) < MAX_BATCH and not self._queue.empty():
                items.append(self._queue.get())
            closing = None in items
            self._commit([item for item in items if item is not None])

    def _commit(self, batch: Sequence[tuple[UsageRecord, Future[None]]]) -> None:
        failure: AccountingError | None = None
        try:
            with transaction(self._connection):
                for record, _ in batch:
                    self._insert(record)
        except Exception as error:  # whatever it was, nobody may wait for ever
            logger.error("%s: %d usage records were not written: %s", self.path, len(batch), error)
            failure = AccountingError(f"the usage of this request could not be recorded: {error}")
        for _, written in batch:
            if failure is None:
                written.set_result(None)
            else:
                written.set_exception(failure)

    def _insert(self, r: UsageRecord) -> None:
        day = period_of("day", r.created)
        self._connection.execute(_INSERT, (day, *astuple(r)))
        counts = (r.prompt_tokens, r.cached_tokens, r.completion_tokens)
        self._connection.execute(_ADD, (day, r.tenant, r.key, r.model, *counts))


def usage_sums(
    path: Path,
    group_by: Sequence[str],
    *,
    first_day: str = "",
    last_day: str = "9999-12-31",
    where: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Sums of usage, a row for each group, in its order.

    Args:
        group_by: some of ``GROUPS``; none of them gives a single row.
        where: wanted values of some of ``GROUPS``.

    Raises:
        RequestError: names in ``group_by`` that are unknown, or there twice.
    """
    if unknown := [name for name in group_by if name not in GROUPS]:
        raise RequestError(
            f"group_by: {unknown[0][:64]!r} is not one of {', '.join(GROUPS)}", param="group_by"
        )
    if len(set(group_by)) < len(group_by):
        raise RequestError("group_by names a column twice", param="group_by")
    conditions, values = ["day BETWEEN ? AND ?"], [first_day, last_day]
    for name, value in (where or {}).items():
        assert name in GROUPS
        conditions.append(f"{name} = ?")
        values.append(value)
    sums = [f"coalesce(sum({name}), 0) AS {name}" for name in SUMS]
    query = f"SELECT {', '.join([*group_by, *sums])} FROM usage_by_day"
    query += f" WHERE {' AND '.join(conditions)}"
    if group_by:
        query += f" GROUP BY {', '.join(group_by)} ORDER BY {', '.join(group_by)}"
    with closing(open_database(path, MIGRATIONS)) as connection:
        rows = connection.execute(query, values).fetchall()
    return [dict(zip((*group_by, *SUMS), row, strict=True)) for row in rows]


def used_now(path: Path, now: float) -> dict[str, tuple[int, int]]:
    """Tokens of each tenant and key, named as Subjects are, in the present day and month."""
    day, month = period_of("day", now), period_of("month", now)
    used: dict[str, tuple[int, int]] = {}
    for group in ("tenant", "key"):
        by_month = _tokens(path, group, f"{month}-01", f"{month}-31")
        by_day = _tokens(path, group, day, day)
        for name, tokens in by_month.items():
            used[f"{group} {name}"] = (by_day.get(name, 0), tokens)
    return used


def _tokens(path: Path, group: str, first_day: str, last_day: str) -> dict[str, int]:
    rows = usage_sums(path, [group], first_day=first_day, last_day=last_day)
    return {row[group]: row["prompt_tokens"] + row["completion_tokens"] for row in rows}
