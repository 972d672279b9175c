"""SQLite as the registry and the accounts use it: write-ahead log, whole transactions, migrations.

A commit returns once it is on the disk (``synchronous=FULL``): what was answered survives the
process, and the machine.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from deltaserve.errors import ConfigError

BUSY_SECONDS = 30.0
"""How long a writer waits for another process's transaction."""

Migrations = Sequence[Sequence[str]]
"""Statements that bring a database from version i to i + 1; never changed once released."""


def open_database(path: Path, migrations: Migrations) -> sqlite3.Connection:
    """A connection to the database, made or migrated where needed; only its owner may read it.

    Use it from one thread at a time.

    Raises:
        ConfigError: it cannot be opened, is no database, or was written by a newer version.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make(path)
        connection = sqlite3.connect(
            path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"{path} cannot be opened: {error}") from error
    try:
        _use_wal(connection)
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        _migrate(connection, path, migrations)
    except sqlite3.Error as error:
        connection.close()
        raise ConfigError(
            f"{path} cannot be used: {error}; move it away to begin with an empty one"
        ) from error
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All or nothing. Takes the write lock first, so what is read inside stays true."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite has rolled back by itself when the disk is full
            connection.execute("ROLLBACK")
        raise


def _make(path: Path) -> None:
    """An empty file that only its owner may read, unless there is one.

    One that is there is not even opened: closing it would end all locks that this process holds on
    it. The next program that reads the database would then take itself for the last who does, and
    remove the log to which this process goes on writing.
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _use_wal(connection: sqlite3.Connection) -> None:
    """SQLite does not wait for the others here, when several are the first to open a database."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _migrate(connection: sqlite3.Connection, path: Path, migrations: Migrations) -> None:
    if _version(connection) == len(migrations):  # the usual case, which needs no lock
        return
    with transaction(connection):
        version = _version(connection)
        if version > len(migrations):
            raise ConfigError(
                f"{path} was written by a newer DeltaServe (schema {version}, this one knows "
                f"{len(migrations)}): update, or use another directory"
            )
        for statements in migrations[version:]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(migrations)}")


def _version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)
