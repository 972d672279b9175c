"""Bases, their deltas, and the versions of each: what is registered survives a restart.

A version is identified by its digest: registering the same content again gives the same version.
It becomes the current one when it has been loaded, so that a restart never begins with something
that was never seen to work. Every method is one transaction; several processes may share a
catalogue.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deltaserve.database import open_database, transaction
from deltaserve.errors import ConflictError, NotFoundError
from deltaserve.registry.schema import MIGRATIONS

VersionState = Literal["registered", "ready", "failed"]


@dataclass(frozen=True, slots=True)
class Base:
    digest: str
    name: str
    path: str
    seen: float
    """When it was loaded last; Unix seconds, here and below."""


@dataclass(frozen=True, slots=True)
class Version:
    number: int
    uri: str
    """As it was asked for."""
    path: str
    """The directory that holds it."""
    digest: str
    state: VersionState
    """ready: it has been loaded, at least once."""
    error: str | None
    created: float


@dataclass(frozen=True, slots=True)
class Delta:
    """A name in the API, and what stands behind it."""

    base: str
    """The base's digest."""
    name: str
    current: int | None
    pinned: bool
    created: float
    versions: tuple[Version, ...]

    def version(self, number: int) -> Version:
        """Raises NotFoundError."""
        for version in self.versions:
            if version.number == number:
                return version
        numbers = ", ".join(str(version.number) for version in self.versions)
        raise NotFoundError(
            f"{self.name} has no version {number}; it has {numbers}", param="version"
        )

    def previous(self) -> Version:
        """The latest before the current one that has been loaded. Raises ConflictError."""
        for version in reversed(self.versions):
            if version.number < (self.current or 0) and version.state == "ready":
                return version
        raise ConflictError(f"{self.name} has no earlier version to go back to", param="name")


class Registry:
    """The catalogue in one SQLite file. Safe across threads and processes."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Raises ConfigError when the database cannot be used."""
        self._connection = open_database(path, MIGRATIONS)
        self._connection.row_factory = sqlite3.Row
        self._lock = threading.Lock()
        self._clock = clock

    def close(self) -> None:
        self._connection.close()

    def put_base(self, digest: str, name: str, path: str) -> None:
        """Remember a base, by its present name and path."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO bases VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE "
                "SET name = excluded.name, path = excluded.path, seen = excluded.seen",
                (digest, name, path, self._clock()),
            )

    def bases(self) -> list[Base]:
        """Those that were loaded last come first."""
        with self._transaction() as connection:
            rows = connection.execute("SELECT * FROM bases ORDER BY seen DESC, name")
            return [Base(**row) for row in rows]

    def deltas(self, base: str) -> list[Delta]:
        """All of a base, by name."""
        with self._transaction() as connection:
            names = connection.execute(
                "SELECT name FROM deltas WHERE base = ? ORDER BY name", (base,)
            ).fetchall()
            return [_delta(connection, base, row["name"]) for row in names]

    def delta(self, base: str, name: str) -> Delta:
        """Raises NotFoundError."""
        with self._transaction() as connection:
            return _delta(connection, base, name)

    def register(
        self, base: str, name: str, *, uri: str, path: str, digest: str, pinned: bool | None = None
    ) -> Version:
        """A new delta, or a new version of one; the same digest gives the same version again.

        Args:
            base: digest of a base that was ``put``.
            pinned: None leaves it as it is; a new delta is not pinned.
        """
        with self._transaction() as connection:
            key, now = (base, name), self._clock()
            connection.execute(
                "INSERT INTO deltas VALUES (?, ?, NULL, 0, 1, ?) ON CONFLICT DO NOTHING",
                (*key, now),
            )
            if pinned is not None:
                _set(connection, key, "pinned", int(pinned))
            known = connection.execute(
                "SELECT number FROM versions WHERE base = ? AND name = ? AND digest = ?",
                (*key, digest),
            ).fetchone()
            if known is not None:
                number = known["number"]
                connection.execute(
                    "UPDATE versions SET uri = ?, path = ? "
                    "WHERE base = ? AND name = ? AND number = ?",
                    (uri, path, *key, number),
                )
            else:
                (number,) = connection.execute(
                    "UPDATE deltas SET next_number = next_number + 1 "
                    "WHERE base = ? AND name = ? RETURNING next_number - 1",
                    key,
                ).fetchone()
                connection.execute(
                    "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, 'registered', NULL, ?)",
                    (*key, number, uri, path, digest, now),
                )
            return _delta(connection, *key).version(number)

    def activate(self, base: str, name: str, number: int) -> Delta:
        """It has been loaded: requests get it, and so does a restart. Raises NotFoundError."""
        with self._transaction() as connection:
            _mark(connection, base, name, number, "ready", None)
            _set(connection, (base, name), "current", number)
            return _delta(connection, base, name)

    def fail(self, base: str, name: str, number: int, error: str) -> Delta:
        """It could not be loaded; the current version stays. Raises NotFoundError."""
        with self._transaction() as connection:
            _mark(connection, base, name, number, "failed", error)
            return _delta(connection, base, name)

    def set_pinned(self, base: str, name: str, pinned: bool) -> Delta:
        """Raises NotFoundError."""
        with self._transaction() as connection:
            _delta(connection, base, name)
            _set(connection, (base, name), "pinned", int(pinned))
            return _delta(connection, base, name)

    def remove(self, base: str, name: str) -> None:
        """The delta and all its versions; their files stay. Raises NotFoundError."""
        with self._transaction() as connection:
            _delta(connection, base, name)
            connection.execute("DELETE FROM deltas WHERE base = ? AND name = ?", (base, name))

    def remove_version(self, base: str, name: str, number: int) -> None:
        """Raises NotFoundError, ConflictError for the current one."""
        with self._transaction() as connection:
            delta = _delta(connection, base, name)
            if delta.version(number).number == delta.current:
                raise ConflictError(
                    f"version {number} of {name} is the current one: roll back or publish "
                    "another first",
                    param="version",
                )
            connection.execute(
                "DELETE FROM versions WHERE base = ? AND name = ? AND number = ?",
                (base, name, number),
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, transaction(self._connection) as connection:
            yield connection


def _delta(connection: sqlite3.Connection, base: str, name: str) -> Delta:
    key = (base, name)
    row = connection.execute("SELECT * FROM deltas WHERE base = ? AND name = ?", key).fetchone()
    if row is None:
        raise NotFoundError(f"no delta {name[:128]!r} is registered", param="name")
    versions = connection.execute(
        "SELECT number, uri, path, digest, state, error, created FROM versions "
        "WHERE base = ? AND name = ? ORDER BY number",
        key,
    )
    return Delta(
        base,
        name,
        row["current"],
        bool(row["pinned"]),
        row["created"],
        tuple(Version(**version) for version in versions),
    )


def _set(connection: sqlite3.Connection, key: tuple[str, str], column: str, value: Any) -> None:
    connection.execute(f"UPDATE deltas SET {column} = ? WHERE base = ? AND name = ?", (value, *key))


def _mark(
    connection: sqlite3.Connection,
    base: str,
    name: str,
    number: int,
    state: VersionState,
    error: str | None,
) -> None:
    _delta(connection, base, name).version(number)  # raises if there is none
    connection.execute(
        "UPDATE versions SET state = ?, error = ? WHERE base = ? AND name = ? AND number = ?",
        (state, error, base, name, number),
    )
