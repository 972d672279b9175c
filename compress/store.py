"""Writing a delta from a stream of changes, and the base that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path

from deltaserve.artifact.checkpoint import HEAD, Checkpoint
from deltaserve.artifact.digest import checkpoint_digest
from deltaserve.artifact.files import copy_changed
from deltaserve.artifact.manifest import BaseRef, ClassBytes, Manifest, SourceRef
from deltaserve.artifact.quality import Quality
from deltaserve.artifact.safetensors_io import MAX_SHARD_BYTES
from deltaserve.artifact.staging import write_text
from deltaserve.artifact.writer import DeltaWriter, record_quality
from deltaserve.compress.card import model_card
from deltaserve.compress.change import Change, base_head
from deltaserve.compress.classify import classify
from deltaserve.compress.common import PathLike, Progress
from deltaserve.compress.lora import Adapter
from deltaserve.compress.text import Text


@dataclass(frozen=True)
class Origin:
    """The base, opened and hashed once however many fine-tunes are compressed."""

    checkpoint: Checkpoint
    digest: str

    @classmethod
    def open(cls, base: PathLike, report: Progress) -> Origin:
        checkpoint = Checkpoint.open(base)
        digest = checkpoint_digest(checkpoint, lambda done, total: report("hash base", done, total))
        return cls(checkpoint, digest)


@dataclass(frozen=True)
class Destination:
    """out: the new directory; shard_bytes: largest file in it."""

    out: Path
    shard_bytes: int = MAX_SHARD_BYTES


def source_digest(source: Checkpoint | Adapter, report: Progress) -> str:
    """Reads all of it."""
    return checkpoint_digest(source, lambda done, total: report("hash model", done, total))


def store(
    origin: Origin,
    source: Checkpoint | Adapter,
    digest: str,
    changes: Iterable[Change],
    to: Destination,
    report: Progress,
    text: Text | None = None,
    quality: Callable[[str], Quality] | None = None,
) -> Generator[None, None, Manifest]:
    """Write ``source`` (of that digest) as a delta of the base; yields after each parameter.

    quality: makes the report for the delta's digest. Nothing is left at the destination
    unless all went well.
    """
    base = origin.checkpoint
    with DeltaWriter(to.out, max_shard_bytes=to.shard_bytes) as writer:
        full, done = [], 0
        for change in changes:
            if change.enc is not None:
                writer.add(change.name, change.enc, kind=change.kind, error=change.error)
            full.append((change.kind, change.full_bytes))
            done += change.full_bytes
            report("write", min(done, source.num_bytes), source.num_bytes)
            yield
        if isinstance(source, Adapter):
            full = [(classify(n, base.shape(n)), _size(base, n)) for n in base.names()]
        copy_changed(source.path, base.path, writer.directory)
        manifest = writer.finish(
            base=BaseRef(base.name, _revision(base.path), origin.digest),
            source=SourceRef(
                source.name, digest, "lora" if isinstance(source, Adapter) else "full"
            ),
            architecture=base.architecture,
            full=ClassBytes.of(full),
            calibration=None if text is None else text.ref(),
        )
        if quality is not None:
            manifest = record_quality(writer.directory, manifest, quality(manifest.digest))
        write_text(writer.directory / "README.md", model_card(manifest))
        writer.commit()
    return manifest


def adapter_changes(base: Checkpoint, adapter: Adapter) -> Iterable[Change]:
    """What a LoRA adapter changes, exactly."""
    targets = adapter.targets(base)
    if adapter.keeps_base_head(base, targets):
        yield Change(HEAD, "head", base_head(base.tensor(HEAD)), 0.0, 0)
    for target in targets:
        enc = adapter.encode(target, base)
        stored = sum(t.numel() * t.element_size() for t in enc.tensors.values())
        yield Change(target.parameter, classify(target.parameter, enc.shape), enc, 0.0, stored)


def _size(checkpoint: Checkpoint, name: str) -> int:
    tensor = checkpoint.tensor(name)
    return tensor.numel() * tensor.element_size()


def _revision(path: Path) -> str | None:
    """The commit of a hub snapshot: its directory is named after it."""
    real = path.resolve()
    return real.name if real.parent.name == "snapshots" else None
