"""What users see of the served models."""

from __future__ import annotations

from dataclasses import asdict

from deltaserve.engine.base import Base
from deltaserve.engine.operands import Needs
from deltaserve.engine.residency import Residency
from deltaserve.engine.types import ModelInfo, ResidencyStats
from deltaserve.engine.versions import Catalogue, DeltaVersion, State


def base_version(name: str, base: Base, vocab_size: int) -> DeltaVersion:
    """The base as requests are bound to it: always there, in slot 0, and free of charge."""
    needs = Needs(0, 0, 0, 0, vocab_size)
    path = str(base.checkpoint.path)
    return DeltaVersion(name, 1, path, base.digest, needs, state=State.READY, pinned=True, slot=0)


def model_infos(loaded: Base, base: DeltaVersion, catalogue: Catalogue) -> list[ModelInfo]:
    """The base first, then the deltas by name, then those that drain and have no name any more."""
    first = ModelInfo(
        name=base.name,
        path=base.path,
        parent=None,
        digest=base.digest,
        full_bytes=loaded.checkpoint.num_bytes,
        resident_bytes=loaded.num_bytes,
        disk_bytes=loaded.checkpoint.num_bytes,
        vocab_size=base.needs.vocab_size,
        pinned=True,
    )
    served = [_info(s.current, base.name, s.error) for s in catalogue.served.values()]
    leaving = {v.name: v for v in catalogue.left if v.name not in catalogue.served}
    return [first, *served, *(_info(v, base.name, None) for v in leaving.values())]


def residency_stats(residency: Residency) -> ResidencyStats:
    """Cheap enough for every step."""
    device, host, merger = residency.device, residency.host, residency.merger
    return ResidencyStats(
        registered=residency.catalogue.num_versions,
        device_deltas=len(device),
        device_bytes=device.used_bytes,
        device_limit=device.limits.device_bytes,
        merged_deltas=len(merger),
        merged_bytes=merger.used_bytes,
        merged_limit=merger.limit_bytes,
        host_deltas=len(host),
        host_bytes=host.used_bytes,
        host_limit=host.limit_bytes,
        **asdict(residency.counts),
    )


def _info(version: DeltaVersion, parent: str, candidate_error: str | None) -> ModelInfo:
    manifest = version.manifest
    assert manifest is not None
    return ModelInfo(
        name=version.name,
        path=version.path,
        parent=parent,
        digest=version.digest,
        codecs=tuple(sorted({entry.codec for entry in manifest.tensors.values()})),
        full_bytes=manifest.sizes.full.total,
        resident_bytes=manifest.sizes.resident.total,
        disk_bytes=manifest.sizes.disk.total,
        vocab_size=version.needs.vocab_size,
        merged=version.merged is not None,
        state=str(version.shown_state),
        tier=str(version.tier),
        version=version.number,
        pinned=version.pinned,
        error=version.error or candidate_error,
    )
