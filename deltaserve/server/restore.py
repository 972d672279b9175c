"""A restart serves what was served before: what the registry says, and what it learns."""

from __future__ import annotations

import logging
from pathlib import Path

from deltaserve.artifact.reader import Delta as Artifact
from deltaserve.config import DeltaSource, EngineConfig
from deltaserve.engine.client import EngineClient
from deltaserve.errors import ArtifactError
from deltaserve.registry.catalogue import Registry, Version

logger = logging.getLogger(__name__)


def registered_deltas(registry: Registry, base: str) -> tuple[DeltaSource, ...]:
    """The current versions of all deltas of the base that was loaded from ``base`` last.

    One that is not what was published is left out, and the registry says why.
    """
    digests = [known.digest for known in registry.bases() if known.path == _place(base)]
    sources = []
    for delta in registry.deltas(digests[0]) if digests else ():
        if delta.current is not None:
            version = delta.version(delta.current)
            if (problem := _problem(version)) is None:
                source = DeltaSource(delta.name, version.path, delta.pinned, required=False)
                sources.append(source)
            else:
                registry.fail(delta.base, delta.name, version.number, problem)
    return tuple(sources)


def remember(client: EngineClient, registry: Registry, config: EngineConfig) -> None:
    """After the start: the base and the deltas of the configuration, and which of the registered
    ones could not be served."""
    base, *deltas = client.models()
    assert base.digest is not None
    registry.put_base(base.digest, base.name, _place(config.base))
    served = {info.name: info for info in deltas}
    for source in config.deltas:
        info = served[source.name]
        assert info.digest is not None
        version = registry.register(
            base.digest, info.name, uri=source.path, path=info.path, digest=info.digest
        )
        registry.activate(base.digest, info.name, version.number)
    for delta in registry.deltas(base.digest):
        found = served.get(delta.name)
        if delta.current is not None and (found is None or found.state == "error"):
            known = delta.version(delta.current).error
            reason = (found and found.error) or known or "the engine refused it; its log says why"
            logger.error("the delta %s is not served: %s", delta.name, reason)
            registry.fail(base.digest, delta.name, delta.current, reason)


def _problem(version: Version) -> str | None:
    """Why a version cannot be served, as far as its manifest tells."""
    try:
        found = Artifact.open(version.path).manifest.digest
    except ArtifactError as error:
        return str(error)
    if found != version.digest:
        return f"{version.path} is not what was published: its digest is {found}; publish it again"
    return None


def _place(base: str) -> str:
    """How a base is known before it is loaded: its real directory, or its hub id."""
    return str(Path(base).resolve()) if Path(base).is_dir() else base
