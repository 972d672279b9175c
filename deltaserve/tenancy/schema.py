"""The database of the accounts: tenants, keys, usage, audit."""

from __future__ import annotations

from deltaserve.database import Migrations

MIGRATIONS: Migrations = (
    (
        """CREATE TABLE tenants (
            id TEXT PRIMARY KEY,
            settings TEXT NOT NULL,  -- JSON
            created REAL NOT NULL
        ) STRICT""",
        # A tenant of the YAML file may have keys here, so this is no foreign key.
        """CREATE TABLE keys (
            sha256 TEXT PRIMARY KEY,
            tenant TEXT NOT NULL,
            settings TEXT NOT NULL,  -- JSON
            created REAL NOT NULL,
            expires REAL  -- null: never
        ) STRICT""",
        """CREATE TABLE usage (
            request_id TEXT PRIMARY KEY,
            day TEXT NOT NULL,  -- UTC, of created
            created REAL NOT NULL,
            finished REAL NOT NULL,
            tenant TEXT NOT NULL,
            key TEXT NOT NULL,
            end_user TEXT,
            model TEXT NOT NULL,
            digest TEXT,
            endpoint TEXT NOT NULL,
            outcome TEXT NOT NULL,
            prompt_tokens INTEGER NOT NULL,
            cached_tokens INTEGER NOT NULL,
            completion_tokens INTEGER NOT NULL
        ) STRICT""",
        # Kept with each record, so that a month's sum does not read a month's records.
        """CREATE TABLE usage_by_day (
            day TEXT NOT NULL,
            tenant TEXT NOT NULL,
            key TEXT NOT NULL,
            model TEXT NOT NULL,
            requests INTEGER NOT NULL,
            prompt_tokens INTEGER NOT NULL,
            cached_tokens INTEGER NOT NULL,
            completion_tokens INTEGER NOT NULL,
            PRIMARY KEY (day, tenant, key, model)
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE audit (
            id INTEGER PRIMARY KEY,
            at REAL NOT NULL,
            actor TEXT NOT NULL,
            action TEXT NOT NULL,
            object TEXT NOT NULL,
            before TEXT,  -- JSON
            after TEXT  -- JSON
        ) STRICT""",
    ),
)
