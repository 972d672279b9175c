"""Writing a delta: parts are streamed into a directory that appears only when complete."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.codecs.base import Encoded, dtype_name
from deltaserve.artifact.digest import tensor_line
from deltaserve.artifact.manifest import (
    MANIFEST,
    BaseRef,
    ClassBytes,
    Manifest,
    Sizes,
    SourceRef,
    TensorEntry,
    artifact_digest,
)
from deltaserve.artifact.quality import Quality, TextRef
from deltaserve.artifact.safetensors_io import MAX_SHARD_BYTES, SafetensorsWriter
from deltaserve.artifact.staging import StagedDirectory, replacing, write_text

STEM = "delta"


class DeltaWriter:
    """``with DeltaWriter(out) as w: w.add(...); w.commit(...)``.

    Raises OutputExistsError if ``out`` exists and is not empty. Without ``commit``
    nothing is left behind.
    """

    def __init__(
        self, out: str | os.PathLike[str], *, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self._staged = StagedDirectory(out)
        self._max_shard_bytes = max_shard_bytes
        self._entries: dict[str, TensorEntry] = {}
        self._lines: list[str] = []

    def __enter__(self) -> DeltaWriter:
        self._staged.__enter__()
        self._files = SafetensorsWriter(
            self._staged.path, STEM, max_shard_bytes=self._max_shard_bytes
        )
        return self

    def __exit__(self, *exc: object) -> None:
        self._staged.__exit__(*exc)

    @property
    def directory(self) -> Path:
        """Where further files of the artifact (tokenizer, model card) are put."""
        return self._staged.path

    def add(self, name: str, enc: Encoded, *, kind: str, error: float) -> TensorEntry:
        """Store a parameter. kind: its class; error: see ``TensorEntry``."""
        for part in sorted(enc.tensors):
            tensor = enc.tensors[part]
            sha256 = self._files.add(f"{name}.{part}", tensor)
            self._lines.append(tensor_line(f"{name}.{part}", tensor.dtype, tensor.shape, sha256))
        entry = TensorEntry(
            codec=enc.codec,
            params=enc.params,
            shape=enc.shape,
            dtype=dtype_name(enc.dtype),
            kind=kind,
            bytes=enc.num_bytes,
            resident_bytes=get_codec(enc.codec).resident_bytes(enc),
            error=error,
        )
        self._entries[name] = entry
        return entry

    def finish(
        self,
        *,
        base: BaseRef,
        source: SourceRef,
        architecture: str,
        full: ClassBytes,
        calibration: TextRef | None = None,
    ) -> Manifest:
        """Complete files and manifest; the artifact is still invisible until ``commit``."""
        written = self._files.finish()
        entries = self._entries.values()
        disk = [(e.kind, e.bytes) for e in entries] + [("other", written.headers)]
        sizes = Sizes(
            full=full,
            resident=ClassBytes.of((e.kind, e.resident_bytes) for e in entries),
            disk=ClassBytes.of(disk),
        )
        draft = Manifest(
            base, source, architecture, self._entries, sizes, "", calibration=calibration
        )
        manifest = replace(draft, digest=artifact_digest(draft.to_json(), self._lines))
        text = json.dumps(manifest.to_json(), indent=1) + "\n"
        write_text(self.directory / MANIFEST, text)
        return manifest

    def commit(self) -> None:
        """Rename the directory to its final name."""
        self._staged.commit()


def record_quality(directory: Path, manifest: Manifest, quality: Quality) -> Manifest:
    """Put a report into the delta's manifest, in place of an older one; the digest stays."""
    reported = replace(manifest, quality=quality)
    with replacing(directory / MANIFEST, durable=True) as partial:
        partial.write_text(json.dumps(reported.to_json(), indent=1) + "\n", encoding="utf-8")
    return reported
