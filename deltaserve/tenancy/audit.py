"""Who changed what, and when: a line for each change that an administrator makes."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from deltaserve.database import open_database
from deltaserve.tenancy.schema import MIGRATIONS

COLUMNS = ("id", "at", "actor", "action", "object", "before", "after")


def write(
    connection: sqlite3.Connection,
    at: float,
    actor: str,
    action: str,
    object_: str,
    before: Any,
    after: Any,
) -> None:
    """Part of the caller's transaction. ``before`` and ``after`` are JSON values, or None."""
    texts = [None if value is None else json.dumps(value) for value in (before, after)]
    connection.execute(
        "INSERT INTO audit (at, actor, action, object, before, after) VALUES (?, ?, ?, ?, ?, ?)",
        (at, actor, action, object_, *texts),
    )


def read(path: Path, *, limit: int, before_id: int | None = None) -> list[dict[str, Any]]:
    """The latest lines, the newest first; those before ``before_id``."""
    query = f"SELECT {', '.join(COLUMNS)} FROM audit WHERE id < ? ORDER BY id DESC LIMIT ?"
    with closing(open_database(path, MIGRATIONS)) as connection:
        rows = connection.execute(query, (before_id or 2**62, limit)).fetchall()
    lines = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    for line in lines:
        for name in ("before", "after"):
            line[name] = None if line[name] is None else json.loads(line[name])
    return lines
