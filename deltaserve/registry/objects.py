"""Deltas from web servers and object stores, fetched once into a folder of this machine.

Only addresses below the configured ones are asked. A delta appears under its final name when all
of it is here and is what its manifest says; what was cut off goes on where it ended.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from deltaserve.errors import ArtifactError, ConfigError, RequestError
from deltaserve.registry.remotes import (
    CLOUD_SCHEMES,
    WEB_SCHEMES,
    Remote,
    RemoteError,
    import_obstore,
    open_remote,
)

# No user, port of a name only, no query, no escapes: an address that means one thing to everybody.
ADDRESS = re.compile(
    r"(?P<scheme>[a-z0-9]+)://[A-Za-z0-9.-]+(:\d{1,5})?(/[A-Za-z0-9._~=+,@-]+)*", re.ASCII
)
MANIFEST, WEIGHTS = "delta.json", "delta.safetensors"
MAX_MANIFEST_BYTES = 64 * 2**20
MAX_SHARDS = 99
PARTIAL = ".partial"
STOPPED = "the server is shutting down; publish it again, and the download goes on"


def check_address(uri: str) -> str:
    """Without a slash at its end. Raises ValueError: no address from which deltas can come."""
    address = uri.rstrip("/")
    match = ADDRESS.fullmatch(address)
    if match is None or match["scheme"] not in CLOUD_SCHEMES + WEB_SCHEMES:
        raise ValueError(f"{uri[:512]!r} is no s3://, gs://, az://, https:// or http:// address")
    if {".", ".."} & set(address.split("/")):
        raise ValueError(f"{uri[:512]!r} must not hold . or .. between its slashes")
    return address


class Objects:
    """Safe across threads. ``fetch`` of one address happens once at a time."""

    def __init__(
        self,
        prefixes: Iterable[str],
        folder: Path,
        *,
        max_bytes: int,
        companions: Sequence[str],
        verify: Callable[[Path], None],
        opener: Callable[[str], Remote] = open_remote,
    ) -> None:
        """
        Args:
            prefixes: what may be fetched is there or below.
            folder: where deltas are kept; made when the first is fetched.
            companions: the files that a delta may have beside manifest and weights.
            verify: raises ArtifactError for a directory that is no undamaged delta.

        Raises ConfigError.
        """
        try:
            self._prefixes = tuple(map(check_address, prefixes))
        except ValueError as error:
            raise ConfigError(f"delta_urls: {error}") from error
        if any(prefix.startswith(CLOUD_SCHEMES) for prefix in self._prefixes):
            import_obstore()  # that it is missing is known at the start
        self._folder = folder
        self._max_bytes = max_bytes
        self._companions = tuple(companions)
        self._verify = verify
        self._open = opener
        self._stopped = threading.Event()
        self._guard = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}

    def stop(self) -> None:
        """Downloads end with an error at their next piece."""
        self._stopped.set()

    def fetch(self, uri: str) -> Path:
        """The directory of a verified delta. Takes as long as the download.

        Raises RequestError.
        """
        address = self._allowed(uri)
        with self._guard:
            lock = self._locks.setdefault(address, threading.Lock())
        try:
            with lock:
                remote = self._open(address)
                try:
                    return self._fetch(remote, address)
                finally:
                    remote.close()
        except (RemoteError, ConfigError, OSError) as error:
            raise RequestError(f"{uri} cannot be fetched: {error}", param="path") from error

    def _allowed(self, uri: str) -> str:
        try:
            address = check_address(uri)
        except ValueError as error:
            raise RequestError(str(error), param="path") from None
        if not any(f"{address}/".startswith(f"{prefix}/") for prefix in self._prefixes):
            raise RequestError(
                f"deltas may not be fetched from {address}: it is below none of the configured "
                "delta_urls",
                param="path",
            )
        return address

    def _fetch(self, remote: Remote, address: str) -> Path:
        manifest = self._manifest(remote)
        # By content: the next version at the same address is another directory.
        name = hashlib.sha256(address.encode() + b"\0" + manifest).hexdigest()[:32]
        final, partial = self._folder / name, self._folder / f"{name}{PARTIAL}"
        if final.is_dir():
            return final
        sizes = self._sizes(remote)
        partial.mkdir(parents=True, exist_ok=True)
        (partial / MANIFEST).write_bytes(manifest)
        for file, size in sizes.items():
            self._copy(remote, file, size, partial / file)
        try:
            self._verify(partial)
        except ArtifactError as error:
            shutil.rmtree(partial)  # not to be gone on with
            message = str(error).replace(str(partial), address)
            raise RequestError(message, param="path") from error
        partial.rename(final)
        return final

    def _manifest(self, remote: Remote) -> bytes:
        size = remote.size(MANIFEST)
        if size is None:
            raise RemoteError(f"there is no {MANIFEST}, so it is no delta")
        if size > MAX_MANIFEST_BYTES:
            raise RemoteError(f"{MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes")
        return b"".join(self._pieces(remote, MANIFEST, 0, size))

    def _sizes(self, remote: Remote) -> dict[str, int]:
        """Bytes of all files but the manifest."""
        names = [*self._weights(remote), *self._companions, "README.md"]
        found = {name: remote.size(name) for name in names}
        sizes = {name: size for name, size in found.items() if size is not None}
        if sum(sizes.values()) > self._max_bytes:
            raise RemoteError(
                f"it has {sum(sizes.values())} bytes, and max_delta_bytes is {self._max_bytes}"
            )
        return sizes

    def _weights(self, remote: Remote) -> list[str]:
        if remote.size(WEIGHTS) is not None:
            return [WEIGHTS]
        stem = WEIGHTS.partition(".")[0]
        for count in range(1, MAX_SHARDS + 1):
            shards = [f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
            if remote.size(shards[0]) is not None:
                return shards
        raise RemoteError(f"there is no {WEIGHTS}")

    def _copy(self, remote: Remote, name: str, size: int, to: Path) -> None:
        """Goes on with what is there."""
        with to.open("ab") as file:
            if file.tell() > size:  # of another file; what fits but differs is found by its digest
                file.truncate(0)
            for piece in self._pieces(remote, name, file.tell(), size):
                file.write(piece)

    def _pieces(self, remote: Remote, name: str, start: int, size: int) -> Iterable[bytes]:
        """Raises RemoteError unless exactly ``size`` bytes come."""
        done = start
        if start == size:
            return
        for piece in remote.read(name, start, size):
            done += len(piece)
            if done > size:
                break
            yield piece
            if self._stopped.is_set():
                raise RemoteError(STOPPED)
        if done != size:
            raise RemoteError(f"{name} has {size} bytes, but {done} came")
