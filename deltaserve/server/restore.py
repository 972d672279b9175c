"""A restart serves what was served before: what the registry says, and what it learns."""

from __future__ import annotations

import logging
from pathlib import Path

from deltaserve.config import DeltaSource, EngineConfig
from deltaserve.engine.client import EngineClient
from deltaserve.registry.catalogue import Registry

logger = logging.getLogger(__name__)


def registered_deltas(registry: Registry, base: str) -> tuple[DeltaSource, ...]:
    """The current versions of all deltas of the base that was loaded from ``base`` last."""
    digests = [known.digest for known in registry.bases() if known.path == _place(base)]
    return tuple(
        DeltaSource(delta.name, delta.version(delta.current).path, delta.pinned, required=False)
        for delta in (registry.deltas(digests[0]) if digests else ())
        if delta.current is not None
    )


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
            reason = (found and found.error) or "it could not be served after a restart"
            logger.error("the delta %s is not served: %s", delta.name, reason)
            registry.fail(base.digest, delta.name, delta.current, reason)


def _place(base: str) -> str:
    """How a base is known before it is loaded: its real directory, or its hub id."""
    return str(Path(base).resolve()) if Path(base).is_dir() else base
