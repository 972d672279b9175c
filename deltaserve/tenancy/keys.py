"""API keys: made here, shown once, known afterwards by their SHA-256 only.

A key holds 256 random bits, so its plain digest cannot be turned back by guessing.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from deltaserve.tenancy.tenants import KeySettings

PREFIX = "sk-ds-"
ID_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is kept. Times are Unix seconds."""

    tenant: str
    sha256: str
    settings: KeySettings
    created: float = 0.0
    expires: float = math.inf
    """From then on it opens nothing; a revoked key has expired."""

    @property
    def id(self) -> str:
        """What the key is called in lists, logs and usage; it tells nothing about the key."""
        return f"key_{self.sha256[:ID_DIGITS]}"


def new_key() -> str:
    """A key that nobody has seen yet."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(key: str) -> str:
    """SHA-256 in hexadecimal digits. Header values come as Latin-1."""
    return hashlib.sha256(key.encode("latin-1", "replace")).hexdigest()


class KeyRing:
    """Finds the key that a client sent, in a time that tells nothing about those that exist.

    A table of digests could be felt out: how long a miss takes depends on where it falls, and
    whoever chooses the key chooses the digest. So the table is ordered by a keyed hash of the
    digest, whose secret never leaves this object, and what it gives is compared in constant time.
    """

    def __init__(self, keys: Iterable[Key]) -> None:
        self._secret = secrets.token_bytes(32)
        self._nobody = Key("", "0" * 64, KeySettings())
        self._keys = {self._blind(key.sha256): key for key in keys}

    def find(self, sent: str) -> Key | None:
        """The key, expired or not, or None."""
        sha256 = digest(sent)
        key = self._keys.get(self._blind(sha256), self._nobody)
        return key if hmac.compare_digest(key.sha256, sha256) else None

    def _blind(self, sha256: str) -> bytes:
        return hmac.digest(self._secret, sha256.encode(), "sha256")
