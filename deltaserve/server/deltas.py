"""Deltas at run time: published, rolled back, pinned and unloaded while others are served.

The registry remembers, the engine serves. A version becomes current in both only when it has been
loaded; what fails leaves what was there before.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from deltaserve.artifact.reader import Delta as Artifact
from deltaserve.config import check_names
from deltaserve.engine.client import EngineClient
from deltaserve.engine.types import ModelInfo
from deltaserve.errors import (
    ArtifactError,
    CheckpointError,
    ConfigError,
    ConflictError,
    RequestError,
    UnknownModelError,
)
from deltaserve.registry.catalogue import Delta, Registry, Version
from deltaserve.registry.sources import Sources
from deltaserve.server.tokenizers import Tokenizers

UNLOADABLE = (ArtifactError, CheckpointError, ConfigError)


class Deltas:
    """Changes of one name happen one after the other; none of them blocks the event loop."""

    def __init__(
        self, client: EngineClient, registry: Registry, sources: Sources, tokenizers: Tokenizers
    ) -> None:
        self._client = client
        self._registry = registry
        self._sources = sources
        self._tokenizers = tokenizers
        self._locks: dict[str, asyncio.Lock] = {}
        base = client.models()[0]
        assert base.digest is not None
        self._base, self._base_name = base.digest, base.name

    async def show(self, name: str) -> dict[str, Any]:
        """Raises NotFoundError."""
        return self._describe(await asyncio.to_thread(self._registry.delta, self._base, name))

    async def show_all(self) -> list[dict[str, Any]]:
        deltas = await asyncio.to_thread(self._registry.deltas, self._base)
        return [self._describe(delta) for delta in deltas]

    async def publish(
        self, name: str, uri: str, *, digest: str | None = None, pinned: bool | None = None
    ) -> dict[str, Any]:
        """Serve what is at ``uri`` as ``name``; returns once requests get it.

        Args:
            digest: what it must be.

        Raises:
            RequestError: it is not there, not what it should be, or cannot be loaded.
        """
        async with self._lock(name):
            version = await asyncio.to_thread(self._register, name, uri, digest, pinned)
            return await self._load(name, version)

    async def activate(
        self, name: str, number: int, *, pinned: bool | None = None
    ) -> dict[str, Any]:
        """Serve a registered version. Raises RequestError, NotFoundError."""
        async with self._lock(name):
            delta = await asyncio.to_thread(self._registry.delta, self._base, name)
            version = delta.version(number)
            if pinned is not None:
                await asyncio.to_thread(self._registry.set_pinned, self._base, name, pinned)
            return await self._load(name, version)

    async def roll_back(self, name: str) -> dict[str, Any]:
        """Serve the version before the current one. Raises NotFoundError, ConflictError."""
        async with self._lock(name):
            delta = await asyncio.to_thread(self._registry.delta, self._base, name)
            return await self._load(name, delta.previous())

    async def pin(self, name: str, pinned: bool) -> dict[str, Any]:
        """Raises NotFoundError; ConflictError when too little memory would be left."""
        async with self._lock(name):
            await asyncio.to_thread(self._registry.delta, self._base, name)
            try:
                await self._client.pin_delta(name, pinned)
            except ConfigError as error:
                raise ConflictError(str(error), param="pinned") from error
            except UnknownModelError as error:
                raise ConflictError(f"{name} is not served at present", param="name") from error
            return self._describe(
                await asyncio.to_thread(self._registry.set_pinned, self._base, name, pinned)
            )

    async def remove(self, name: str) -> None:
        """Serve it no more, and forget it; returns once its memory is free.

        Raises NotFoundError.
        """
        async with self._lock(name):
            await asyncio.to_thread(self._registry.delta, self._base, name)
            with suppress(UnknownModelError):  # its load had failed
                await self._client.unload_delta(name)
            await asyncio.to_thread(self._registry.remove, self._base, name)
            self._tokenizers.keep(self._client.models())

    async def remove_version(self, name: str, number: int) -> dict[str, Any]:
        """Forget a version that is not current. Raises NotFoundError, ConflictError."""
        async with self._lock(name):
            await asyncio.to_thread(self._registry.remove_version, self._base, name, number)
            return await self.show(name)

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    def _register(self, name: str, uri: str, digest: str | None, pinned: bool | None) -> Version:
        """Look at what is there, and remember it. Reads all of it only if it came from afar:
        the engine checks every byte when it loads."""
        try:
            check_names(self._base_name, [name])
            path = self._sources.fetch(uri)
            artifact = Artifact.open(path)
            artifact.check_base(self._base)
            found = artifact.manifest.digest
            if digest is not None and digest != found:
                raise RequestError(
                    f"{uri} has the digest {found}, not {digest}: it is not what you wanted",
                    param="digest",
                )
            if self._sources.is_unchecked(uri):
                artifact.verify_digest()
        except UNLOADABLE as error:
            raise RequestError(str(error), param="path") from error
        return self._registry.register(
            self._base, name, uri=uri, path=str(path), digest=found, pinned=pinned
        )

    async def _load(self, name: str, version: Version) -> dict[str, Any]:
        delta = await asyncio.to_thread(self._registry.delta, self._base, name)
        try:
            await asyncio.to_thread(self._tokenizers.prepare, name, version.path, version.digest)
            info = await self._client.load_delta(name, version.path, delta.pinned)
            if info.digest != version.digest:
                await self._client.unload_delta(name)
                raise ArtifactError(
                    f"{version.path} changed while it was loaded, so {name} is served no more: "
                    "publish it again"
                )
        except UNLOADABLE as error:
            await asyncio.to_thread(
                self._registry.fail, self._base, name, version.number, str(error)
            )
            if delta.current is None:  # a name that never worked shall not be listed
                with suppress(UnknownModelError):
                    await self._client.unload_delta(name)
            raise RequestError(str(error), param="path") from error
        self._tokenizers.keep(self._client.models())
        return self._describe(
            await asyncio.to_thread(self._registry.activate, self._base, name, version.number)
        )

    def _describe(self, delta: Delta) -> dict[str, Any]:
        infos = {info.name: info for info in self._client.models()}
        return describe(delta, infos.get(delta.name))


def describe(delta: Delta, info: ModelInfo | None) -> dict[str, Any]:
    """A delta as the API shows it; times are Unix seconds."""
    live = {
        "state": info.state if info else "not served",
        "tier": info.tier if info else "disk",
        "error": info.error if info else None,
        "bytes": {
            "full": info.full_bytes,
            "resident": info.resident_bytes,
            "disk": info.disk_bytes,
        } if info else None,
    }  # fmt: skip
    versions = [
        {
            "version": version.number,
            "path": version.uri,
            "digest": version.digest,
            "state": version.state,
            "error": version.error,
            "created": int(version.created),
        }
        for version in delta.versions
    ]
    return {
        "object": "delta",
        "name": delta.name,
        "version": delta.current,
        "pinned": delta.pinned,
        "created": int(delta.created),
        **live,
        "versions": versions,
    }
