"""Tenants and their keys: those of the YAML file, and those made through the API.

The file's tenants are changed in the file only; the others live in the database. Each change
and its line in the audit are one transaction.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaserve.database import open_database, transaction
from deltaserve.errors import (
    AuthenticationError,
    ConflictError,
    ForbiddenError,
    NotFoundError,
    RequestError,
)
from deltaserve.tenancy import audit
from deltaserve.tenancy.keys import Key, KeyRing, digest, new_key
from deltaserve.tenancy.limits import Subject
from deltaserve.tenancy.schema import MIGRATIONS
from deltaserve.tenancy.tenants import (
    FileTenant,
    KeySettings,
    NewKey,
    Tenant,
    parse_duration,
    validate,
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request: a tenant, by one of its keys."""

    tenant: Tenant
    key: Key
    salt: str
    """Prefixes are shared within a salt only."""

    @property
    def subjects(self) -> tuple[Subject, Subject]:
        return (
            Subject(f"tenant {self.tenant.id}", self.tenant),
            Subject(f"key {self.key.id}", self.key.settings),
        )

    @property
    def priority(self) -> int:
        own = self.key.settings.priority
        return own if own is not None else self.tenant.priority or 0

    def allows(self, model: str) -> bool:
        return self.tenant.allows(model) and self.key.settings.allows(model)


@dataclass(frozen=True, slots=True)
class View:
    """All tenants and keys at one moment."""

    tenants: Mapping[str, Tenant]
    keys: Mapping[str, Key]
    """By id."""
    ring: KeyRing


class Accounts:
    """Safe across threads: changes exclude each other, ``authenticate`` never waits for one."""

    def __init__(
        self,
        path: Path,
        from_file: Iterable[FileTenant] = (),
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Raises ConfigError when the database cannot be used."""
        self.path = path
        self._connection = open_database(path, MIGRATIONS)
        self._wall = wall
        self._lock = threading.Lock()
        self._salt_secret = secrets.token_bytes(32)
        self._file_tenants: dict[str, Tenant] = {}
        self._file_keys: dict[str, Key] = {}
        for tenant in from_file:
            self._file_tenants[tenant.id] = tenant.plain()
            for listed in tenant.keys:
                key = Key(tenant.id, listed.sha256, listed.settings(), expires=listed.expires)
                self._file_keys[key.id] = key
        self._view = self._read()

    def close(self) -> None:
        self._connection.close()

    # -- requests ---------------------------------------------------------------------------

    def authenticate(self, sent: str) -> Caller:
        """Whose key this is. Raises AuthenticationError, or ForbiddenError when blocked."""
        view = self._view
        key = view.ring.find(sent)
        # The tenant is missing if it was taken out of the file while its other keys stayed.
        tenant = view.tenants.get(key.tenant) if key is not None else None
        if key is None or tenant is None:
            raise AuthenticationError(
                "Missing or wrong API key: send it as 'Authorization: Bearer KEY'."
            )
        if key.expires <= self._wall():
            raise AuthenticationError(f"The API key {key.id} has expired or was revoked.")
        if tenant.blocked or key.settings.blocked:
            raise ForbiddenError("This API key is blocked: ask whoever gave it to you.")
        return Caller(tenant, key, self._salt(tenant, key))

    def salt(self, caller: Caller, asked: str | None) -> str:
        """The salt of a request that asks for one of its own, within the caller's."""
        return caller.salt if asked is None else self._derive(caller.salt, asked)

    # -- management -------------------------------------------------------------------------

    def tenants(self) -> list[Tenant]:
        return list(self._view.tenants.values())

    def tenant(self, tenant_id: str) -> Tenant:
        """Raises NotFoundError."""
        tenant = self._view.tenants.get(tenant_id)
        if tenant is None:
            raise NotFoundError(f"there is no tenant {tenant_id[:64]!r}", param="id")
        return tenant

    def keys(self, tenant_id: str | None = None) -> list[Key]:
        keys = self._view.keys.values()
        return [key for key in keys if tenant_id in (None, key.tenant)]

    def key(self, key_id: str) -> Key:
        """Raises NotFoundError."""
        key = self._view.keys.get(key_id)
        if key is None:
            raise NotFoundError(f"there is no key {key_id[:64]!r}", param="key_id")
        return key

    def is_from_file(self, item: Tenant | Key) -> bool:
        known = self._file_tenants if isinstance(item, Tenant) else self._file_keys
        return item.id in known

    def create_tenant(self, values: Mapping[str, Any], actor: str) -> Tenant:
        """Raises RequestError for wrong fields, ConflictError if there is one of this id."""
        tenant = validate(Tenant, values)
        with self._changing() as connection:
            if tenant.id in self._view.tenants:
                raise ConflictError(f"there is a tenant {tenant.id!r} already", param="id")
            connection.execute(
                "INSERT INTO tenants VALUES (?, ?, ?)", (tenant.id, _dump(tenant), self._wall())
            )
            self._note(actor, "create_tenant", tenant.id, None, tenant)
        return tenant

    def update_tenant(self, tenant_id: str, changes: Mapping[str, Any], actor: str) -> Tenant:
        """Change some fields. Raises RequestError, NotFoundError, ConflictError (the file's)."""
        with self._changing() as connection:
            before = self._own(self.tenant(tenant_id))
            after = validate(Tenant, {**before.model_dump(), **changes})
            if after.id != tenant_id:
                raise RequestError("id: a tenant keeps its id", param="id")
            connection.execute(
                "UPDATE tenants SET settings = ? WHERE id = ?", (_dump(after), tenant_id)
            )
            self._note(actor, "update_tenant", tenant_id, before, after)
        return after

    def delete_tenant(self, tenant_id: str, actor: str) -> None:
        """The tenant and its keys; its usage stays. Raises NotFoundError, ConflictError."""
        with self._changing() as connection:
            before = self._own(self.tenant(tenant_id))
            connection.execute("DELETE FROM keys WHERE tenant = ?", (tenant_id,))
            connection.execute("DELETE FROM tenants WHERE id = ?", (tenant_id,))
            self._note(actor, "delete_tenant", tenant_id, before, None)

    def create_key(self, tenant_id: str, values: Mapping[str, Any], actor: str) -> tuple[str, Key]:
        """A new key, which is not kept and cannot be shown again, and what is kept of it.

        Raises RequestError, NotFoundError.
        """
        asked = validate(NewKey, values)
        settings = asked.settings()
        expires = self._wall() + parse_duration(asked.duration) if asked.duration else math.inf
        with self._changing() as connection:
            self.tenant(tenant_id)
            return self._insert_key(connection, tenant_id, settings, expires, actor, "create_key")

    def rotate_key(self, key_id: str, overlap: float, actor: str) -> tuple[str, Key]:
        """A new key with the same settings; the old one ends ``overlap`` seconds from now.

        Raises NotFoundError, ConflictError (expired, or the file's).
        """
        with self._changing() as connection:
            old, now = self._own(self.key(key_id)), self._wall()
            if old.expires <= now:
                raise ConflictError(f"{key_id} has expired: make a new key", param="key_id")
            self._end_key(connection, old, min(old.expires, now + overlap))
            return self._insert_key(
                connection, old.tenant, old.settings, old.expires, actor, f"rotate {key_id}"
            )

    def update_key(self, key_id: str, changes: Mapping[str, Any], actor: str) -> Key:
        """Change settings. Raises RequestError, NotFoundError, ConflictError (the file's)."""
        with self._changing() as connection:
            key = self._own(self.key(key_id))
            after = validate(KeySettings, {**key.settings.model_dump(), **changes})
            connection.execute(
                "UPDATE keys SET settings = ? WHERE sha256 = ?", (_dump(after), key.sha256)
            )
            self._note(actor, "update_key", key_id, key.settings, after)
        return self.key(key_id)

    def revoke_key(self, key_id: str, actor: str) -> None:
        """End a key at once; it stays in the list. Raises NotFoundError, ConflictError."""
        with self._changing() as connection:
            key, now = self._own(self.key(key_id)), self._wall()
            if key.expires > now:
                self._end_key(connection, key, now)
                self._note(actor, "revoke_key", key_id, key.settings, None)

    def note(self, actor: str, action: str, object_: str, before: Any, after: Any) -> None:
        """A line in the audit about something that is kept elsewhere."""
        with self._lock, transaction(self._connection):
            audit.write(self._connection, self._wall(), actor, action, object_, before, after)

    # -- inside -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """One transaction; after it everybody sees what it changed."""
        with self._lock:
            with transaction(self._connection) as connection:
                yield connection
            self._view = self._read()

    def _read(self) -> View:
        rows = self._connection.execute("SELECT settings FROM tenants ORDER BY id").fetchall()
        tenants = {t.id: t for t in (Tenant.model_validate_json(text) for (text,) in rows)}
        keys = {}
        query = "SELECT tenant, sha256, settings, created, expires FROM keys ORDER BY created"
        for tenant, sha256, text, created, expires in self._connection.execute(query):
            settings = KeySettings.model_validate_json(text)
            end = math.inf if expires is None else expires
            key = Key(tenant, sha256, settings, created, end)
            keys[key.id] = key
        keys |= self._file_keys
        return View(tenants | self._file_tenants, keys, KeyRing(keys.values()))

    def _own(self, item: Any) -> Any:
        """The same, unless it is the file's."""
        if self.is_from_file(item):
            raise ConflictError(f"{item.id} comes from the tenants file: change it there")
        return item

    def _insert_key(
        self, connection: sqlite3.Connection, tenant_id: str, settings: KeySettings,
        expires: float, actor: str, action: str,
    ) -> tuple[str, Key]:  # fmt: skip
        secret = new_key()
        key = Key(tenant_id, digest(secret), settings, self._wall(), expires)
        connection.execute(
            "INSERT INTO keys VALUES (?, ?, ?, ?, ?)",
            (key.sha256, tenant_id, _dump(settings), key.created, _finite(expires)),
        )
        self._note(actor, action, f"{tenant_id}/{key.id}", None, settings)
        return secret, key

    def _end_key(self, connection: sqlite3.Connection, key: Key, expires: float) -> None:
        connection.execute(
            "UPDATE keys SET expires = ? WHERE sha256 = ?", (_finite(expires), key.sha256)
        )

    def _note(self, actor: str, action: str, object_: str, before: Any, after: Any) -> None:
        dumped = [None if item is None else item.model_dump() for item in (before, after)]
        audit.write(self._connection, self._wall(), actor, action, object_, *dumped)

    def _salt(self, tenant: Tenant, key: Key) -> str:
        for kind, given in (("key", key.settings.cache_salt), ("tenant", tenant.cache_salt)):
            if given is not None:
                owner = tenant.id if kind == "key" else ""
                return self._derive(kind, owner, given)
        return self._derive("own", tenant.id)

    def _derive(self, *parts: str) -> str:
        """Different parts, different salts; nobody outside can know or choose one."""
        return hmac.digest(self._salt_secret, json.dumps(parts).encode(), "sha256").hex()


def _dump(item: Tenant | KeySettings) -> str:
    return item.model_dump_json()


def _finite(expires: float) -> float | None:
    return None if math.isinf(expires) else expires
