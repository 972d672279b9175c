"""The database of the catalogue."""

from __future__ import annotations

from deltaserve.database import Migrations

MIGRATIONS: Migrations = (
    (
        """CREATE TABLE bases (
            digest TEXT PRIMARY KEY,
            name TEXT NOT NULL,
            path TEXT NOT NULL,
            seen REAL NOT NULL  -- when it was loaded last
        ) STRICT""",
        # What is current must be a version of this delta; checked at the end of a transaction,
        # because both are made in one.
        """CREATE TABLE deltas (
            base TEXT NOT NULL REFERENCES bases (digest),
            name TEXT NOT NULL,
            current INTEGER,  -- null: none could be loaded yet
            pinned INTEGER NOT NULL CHECK (pinned IN (0, 1)),
            next_number INTEGER NOT NULL,
            created REAL NOT NULL,
            PRIMARY KEY (base, name),
            FOREIGN KEY (base, name, current) REFERENCES versions (base, name, number)
                DEFERRABLE INITIALLY DEFERRED
        ) STRICT""",
        """CREATE TABLE versions (
            base TEXT NOT NULL,
            name TEXT NOT NULL,
            number INTEGER NOT NULL,
            uri TEXT NOT NULL,
            path TEXT NOT NULL,
            digest TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('registered', 'ready', 'failed')),
            error TEXT,
            created REAL NOT NULL,
            PRIMARY KEY (base, name, number),
            UNIQUE (base, name, digest),
            FOREIGN KEY (base, name) REFERENCES deltas (base, name) ON DELETE CASCADE
        ) STRICT""",
    ),
)
