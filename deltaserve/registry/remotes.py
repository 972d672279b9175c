"""Files behind an address: of a web server, or of an object store."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Protocol

import httpx

from deltaserve.errors import ConfigError

CLOUD_SCHEMES = ("s3", "gs", "az")
WEB_SCHEMES = ("https", "http")
CHUNK_BYTES = 8 * 2**20
TIMEOUT_SECONDS = 60.0
"""Without a byte from a web server. Object stores have 30 for a chunk, obstore's default."""


class RemoteError(Exception):
    """What is there cannot be read; the message says why."""


class Remote(Protocol):
    """A folder of files somewhere else. All methods raise RemoteError."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none."""
        ...

    def read(self, name: str, start: int, size: int) -> Iterator[bytes]:
        """The bytes of a file from ``start`` on, at most until ``size``."""
        ...

    def close(self) -> None: ...


def open_remote(uri: str) -> Remote:
    """Raises ConfigError: what it takes is not installed, or not configured."""
    return Web(uri) if uri.partition("://")[0] in WEB_SCHEMES else Cloud(uri)


class Web:
    """A folder of a web server. Redirections are not followed: they could lead anywhere."""

    def __init__(self, uri: str) -> None:
        self._folder = uri.rstrip("/")
        self._client = httpx.Client(
            follow_redirects=False,
            timeout=TIMEOUT_SECONDS,
            headers={"accept-encoding": "identity"},  # or sizes would be those of something else
        )

    def close(self) -> None:
        self._client.close()

    def size(self, name: str) -> int | None:
        try:
            answer = self._client.head(f"{self._folder}/{name}")
        except httpx.HTTPError as error:
            raise RemoteError(_reason(error)) from error
        if answer.status_code in (404, 410):
            return None
        _expect(answer, name, 200)
        length = answer.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()):
            raise RemoteError(f"the server does not tell the size of {name}")
        return int(length)

    def read(self, name: str, start: int, size: int) -> Iterator[bytes]:
        headers = {"range": f"bytes={start}-{size - 1}"} if start else {}
        try:
            with self._client.stream("GET", f"{self._folder}/{name}", headers=headers) as answer:
                _expect(answer, name, 206 if start else 200)
                yield from answer.iter_bytes(CHUNK_BYTES)
        except httpx.HTTPError as error:
            raise RemoteError(_reason(error)) from error


class Cloud:
    """A folder of S3, Google Cloud Storage or Azure, with the credentials and the endpoint that
    the environment names as usual."""

    def __init__(self, uri: str) -> None:
        self._obstore = import_obstore()
        try:
            # Options given here would hide those of the environment, such as AWS_ALLOW_HTTP.
            self._store: Any = self._obstore.store.from_url(uri.rstrip("/"))
        except (self._obstore.exceptions.BaseError, ValueError) as error:
            raise ConfigError(f"the object store of {uri} cannot be used: {error}") from error

    def close(self) -> None:
        pass

    def size(self, name: str) -> int | None:
        try:
            return int(self._obstore.head(self._store, name)["size"])
        except FileNotFoundError:
            return None
        except (self._obstore.exceptions.BaseError, OSError) as error:
            raise RemoteError(_reason(error)) from error

    def read(self, name: str, start: int, size: int) -> Iterator[bytes]:
        try:
            for begin in range(start, size, CHUNK_BYTES):
                end = min(begin + CHUNK_BYTES, size)
                yield bytes(self._obstore.get_range(self._store, name, start=begin, end=end))
        except (self._obstore.exceptions.BaseError, OSError) as error:
            raise RemoteError(_reason(error)) from error


def import_obstore() -> Any:
    """An extra: most servers read from disks. Raises ConfigError."""
    try:
        importlib.import_module("obstore.store")
        importlib.import_module("obstore.exceptions")
        return importlib.import_module("obstore")
    except ImportError as error:
        raise ConfigError(
            "deltas of object stores need the package obstore: pip install 'deltaserve[objects]'"
        ) from error


def _expect(answer: httpx.Response, name: str, status: int) -> None:
    if answer.is_redirect:
        raise RemoteError(f"the server redirects {name}, which is not followed: give its address")
    if answer.status_code != status:
        raise RemoteError(f"the server answers {answer.status_code} when asked for {name}")


def _reason(error: Exception) -> str:
    """One line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
