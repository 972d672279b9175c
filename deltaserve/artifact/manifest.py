"""``delta.json``: what a delta holds, as frozen dataclasses, checked when read.

A manifest may come from anywhere, so every field is checked before anything uses it;
ArtifactError names the field.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from deltaserve.artifact.codecs import CODECS
from deltaserve.artifact.codecs.base import FLOATS, Layout, dtype_name
from deltaserve.artifact.fields import count_at, digest_at, error_at, object_at, shape_at, text_at
from deltaserve.artifact.quality import Quality, TextRef
from deltaserve.artifact.safetensors_io import TO_CODE
from deltaserve.errors import ArtifactError, CodecError

FORMAT = "deltaserve/1"
MANIFEST = "delta.json"
KINDS = ("linear", "embedding", "head", "norm", "bias", "other")
DTYPES = {dtype_name(dtype): dtype for dtype in TO_CODE}
# Not part of the identity: the digest itself, and what was measured later on the same weights.
OUTSIDE_DIGEST = ("digest", "quality")


@dataclass(frozen=True)
class BaseRef:
    """The base that the delta belongs to. revision: the hub commit, if it is known."""

    name: str
    revision: str | None
    digest: str


@dataclass(frozen=True)
class SourceRef:
    """What was compressed. kind: "full" (a checkpoint) or "lora" (a PEFT adapter)."""

    name: str
    digest: str
    kind: str


@dataclass(frozen=True)
class TensorEntry:
    """One stored parameter.

    shape, dtype: of the fine-tuned parameter. kind: one of KINDS. bytes: of the parts on
    disk; resident_bytes: what an engine keeps. error: relative Frobenius error of the
    delta, ||decoded - exact|| / ||exact||, 0 for exact codecs.
    """

    codec: str
    params: dict[str, Any]
    shape: tuple[int, ...]
    dtype: str
    kind: str
    bytes: int
    resident_bytes: int
    error: float

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def layout(self) -> Layout:
        """The parts that the artifact's files must hold for this parameter."""
        return CODECS[self.codec].layout(self.params, self.shape, self.torch_dtype)


@dataclass(frozen=True)
class ClassBytes:
    """Bytes by class of parameter; ``total`` is their sum."""

    total: int = 0
    linear: int = 0
    embedding: int = 0
    head: int = 0
    norm: int = 0
    bias: int = 0
    other: int = 0

    @classmethod
    def of(cls, items: Iterable[tuple[str, int]]) -> ClassBytes:
        """Sum (kind, bytes) pairs."""
        sums = dict.fromkeys(KINDS, 0)
        for kind, size in items:
            sums[kind] += size
        return cls(total=sum(sums.values()), **sums)


@dataclass(frozen=True)
class Sizes:
    """full: everything that the fine-tune stores, changed or not; for a LoRA adapter, which
    stores no model, the dense bytes of the merged model, that is of the base.
    resident: what an engine keeps in memory for the delta. disk: the safetensors files,
    their headers counted in ``other``.
    """

    full: ClassBytes
    resident: ClassBytes
    disk: ClassBytes

    @property
    def resident_ratio(self) -> float:
        """full / resident; infinite for a delta without changes."""
        return _ratio(self.full.total, self.resident.total)

    @property
    def disk_ratio(self) -> float:
        """full / disk."""
        return _ratio(self.full.total, self.disk.total)


@dataclass(frozen=True)
class Manifest:
    """The whole of ``delta.json``. tensors: parameter name -> entry; absent = same as base.

    calibration: the text that quantisation was fitted to.
    quality: the last verify report. It is an observation about the weights, may be made
    anew at any time, and is therefore outside the digest; it names the digest it is about.
    """

    base: BaseRef
    source: SourceRef
    architecture: str
    tensors: Mapping[str, TensorEntry]
    sizes: Sizes
    digest: str
    format: str = FORMAT
    calibration: TextRef | None = None
    quality: Quality | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able object; keys in the order of the fields, tensors by name."""
        entries = {name: asdict(self.tensors[name]) for name in sorted(self.tensors)}
        value = {
            "format": self.format,
            "base": asdict(self.base),
            "source": asdict(self.source),
            "architecture": self.architecture,
            "tensors": {name: {**e, "shape": list(e["shape"])} for name, e in entries.items()},
            "sizes": asdict(self.sizes),
            "digest": self.digest,
        }
        if self.calibration is not None:
            value["calibration"] = self.calibration.to_json()
        if self.quality is not None:
            value["quality"] = self.quality.to_json()
        return value

    @classmethod
    def from_json(cls, value: object) -> Manifest:
        """Check and convert; raises ArtifactError naming the first wrong field."""
        top = object_at(value, "the manifest")
        if top.get("format") != FORMAT:
            raise ArtifactError(
                f"delta.json: format is {top.get('format')!r}, this version reads {FORMAT!r}; "
                "update deltaserve or compress the fine-tune again"
            )
        tensors = object_at(top.get("tensors"), "tensors")
        source = _source(top.get("source"))
        return cls(
            base=_base(top.get("base")),
            source=source,
            architecture=text_at(top, "architecture", ""),
            tensors={name: _entry(name, entry) for name, entry in tensors.items()},
            sizes=_sizes(top.get("sizes")),
            digest=digest_at(top, "digest", ""),
            calibration=_calibration(top),
            quality=_quality(top),
        )


def artifact_digest(manifest: dict[str, Any], part_lines: Iterable[str]) -> str:
    """Identity of a delta: its manifest without OUTSIDE_DIGEST, and all stored parts.

    The manifest is hashed as canonical JSON (sorted keys, no spaces); part_lines come
    from ``digest.tensor_line``.
    """
    rest = {key: value for key, value in manifest.items() if key not in OUTSIDE_DIGEST}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    lines = "".join(sorted(part_lines))
    return "sha256:" + hashlib.sha256(f"{text}\n{lines}".encode()).hexdigest()


def _ratio(full: int, part: int) -> float:
    return full / part if part else math.inf


def _base(value: object) -> BaseRef:
    base = object_at(value, "base")
    revision = base.get("revision")
    if revision is not None:
        revision = text_at(base, "revision", "base.")
    return BaseRef(text_at(base, "name", "base."), revision, digest_at(base, "digest", "base."))


def _source(value: object) -> SourceRef:
    source = object_at(value, "source")
    kind = text_at(source, "kind", "source.")
    if kind not in ("full", "lora"):
        raise ArtifactError(f"delta.json: source.kind must be full or lora, not {kind!r}")
    return SourceRef(
        text_at(source, "name", "source."), digest_at(source, "digest", "source."), kind
    )


def _calibration(top: dict[str, Any]) -> TextRef | None:
    return TextRef.from_json(top["calibration"], "calibration") if "calibration" in top else None


def _quality(top: dict[str, Any]) -> Quality | None:
    if "quality" not in top:
        return None
    quality = Quality.from_json(top["quality"])
    if quality.delta != top["digest"]:
        raise ArtifactError(
            f"delta.json: quality was measured on the delta {quality.delta}, this one is "
            f"{top['digest']}; remove quality and run deltaserve verify again"
        )
    return quality


def _entry(name: str, value: object) -> TensorEntry:
    where = f"tensors[{name!r}]."
    entry = object_at(value, where[:-1])
    for key, known in (("codec", CODECS), ("dtype", DTYPES), ("kind", KINDS)):
        if text_at(entry, key, where) not in known:
            raise ArtifactError(
                f"delta.json: {where}{key} is {entry[key]!r}; known are {', '.join(known)}"
            )
    result = TensorEntry(
        codec=entry["codec"],
        params=object_at(entry.get("params"), f"{where}params"),
        shape=shape_at(entry.get("shape"), f"{where}shape"),
        dtype=entry["dtype"],
        kind=entry["kind"],
        bytes=count_at(entry, "bytes", where),
        resident_bytes=count_at(entry, "resident_bytes", where),
        error=error_at(entry.get("error"), f"{where}error"),
    )
    try:
        layout = result.layout()
    except CodecError as cause:
        raise ArtifactError(f"delta.json: {where}params: {cause}") from None
    stored = sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())
    if stored != result.bytes:
        raise ArtifactError(f"delta.json: {where}bytes is {result.bytes}, its parts take {stored}")
    if CODECS[result.codec].additive and result.torch_dtype not in FLOATS:
        raise ArtifactError(f"delta.json: {where}dtype {result.dtype} does not fit its codec")
    return result


def _sizes(value: object) -> Sizes:
    sizes = object_at(value, "sizes")
    parts = {}
    for part in fields(Sizes):
        counts = object_at(sizes.get(part.name), f"sizes.{part.name}")
        where = f"sizes.{part.name}."
        parts[part.name] = ClassBytes(
            **{f.name: count_at(counts, f.name, where) for f in fields(ClassBytes)}
        )
    return Sizes(**parts)
