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
from typing import Any, TypeVar

import torch

from deltaserve.artifact.codecs import CODECS
from deltaserve.artifact.codecs.base import FLOATS, Layout, dtype_name
from deltaserve.artifact.safetensors_io import TO_CODE
from deltaserve.errors import ArtifactError, CodecError

FORMAT = "deltaserve/1"
MANIFEST = "delta.json"
KINDS = ("linear", "embedding", "head", "norm", "bias", "other")
DTYPES = {dtype_name(dtype): dtype for dtype in TO_CODE}
# No tensor of any model comes near; a hostile shape must not reach an allocation.
MAX_ELEMENTS = 1 << 40
MAX_DIMS = 8

T = TypeVar("T")


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
    """The whole of ``delta.json``. tensors: parameter name -> entry; absent = same as base."""

    base: BaseRef
    source: SourceRef
    architecture: str
    tensors: Mapping[str, TensorEntry]
    sizes: Sizes
    digest: str
    format: str = FORMAT

    def to_json(self) -> dict[str, Any]:
        """A JSON-able object; keys in the order of the fields, tensors by name."""
        entries = {name: asdict(self.tensors[name]) for name in sorted(self.tensors)}
        return {
            "format": self.format,
            "base": asdict(self.base),
            "source": asdict(self.source),
            "architecture": self.architecture,
            "tensors": {name: {**e, "shape": list(e["shape"])} for name, e in entries.items()},
            "sizes": asdict(self.sizes),
            "digest": self.digest,
        }

    @classmethod
    def from_json(cls, value: object) -> Manifest:
        """Check and convert; raises ArtifactError naming the first wrong field."""
        top = _object(value, "the manifest")
        if top.get("format") != FORMAT:
            raise ArtifactError(
                f"delta.json: format is {top.get('format')!r}, this version reads {FORMAT!r}; "
                "update deltaserve or compress the fine-tune again"
            )
        tensors = _object(top.get("tensors"), "tensors")
        source = _source(top.get("source"))
        return cls(
            base=_base(top.get("base")),
            source=source,
            architecture=_text(top, "architecture", ""),
            tensors={name: _entry(name, entry) for name, entry in tensors.items()},
            sizes=_sizes(top.get("sizes")),
            digest=_digest(top, "digest", ""),
        )


def artifact_digest(manifest: dict[str, Any], part_lines: Iterable[str]) -> str:
    """Identity of a delta: its manifest without ``digest``, and all stored parts.

    The manifest is hashed as canonical JSON (sorted keys, no spaces); part_lines come
    from ``digest.tensor_line``.
    """
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    lines = "".join(sorted(part_lines))
    return "sha256:" + hashlib.sha256(f"{text}\n{lines}".encode()).hexdigest()


def _ratio(full: int, part: int) -> float:
    return full / part if part else math.inf


def _base(value: object) -> BaseRef:
    base = _object(value, "base")
    revision = base.get("revision")
    if revision is not None:
        revision = _text(base, "revision", "base.")
    return BaseRef(_text(base, "name", "base."), revision, _digest(base, "digest", "base."))


def _source(value: object) -> SourceRef:
    source = _object(value, "source")
    kind = _text(source, "kind", "source.")
    if kind not in ("full", "lora"):
        raise ArtifactError(f"delta.json: source.kind must be full or lora, not {kind!r}")
    return SourceRef(_text(source, "name", "source."), _digest(source, "digest", "source."), kind)


def _entry(name: str, value: object) -> TensorEntry:
    where = f"tensors[{name!r}]."
    entry = _object(value, where[:-1])
    for key, known in (("codec", CODECS), ("dtype", DTYPES), ("kind", KINDS)):
        if _text(entry, key, where) not in known:
            raise ArtifactError(
                f"delta.json: {where}{key} is {entry[key]!r}; known are {', '.join(known)}"
            )
    result = TensorEntry(
        codec=entry["codec"],
        params=_object(entry.get("params"), f"{where}params"),
        shape=_shape(entry.get("shape"), f"{where}shape"),
        dtype=entry["dtype"],
        kind=entry["kind"],
        bytes=_count(entry, "bytes", where),
        resident_bytes=_count(entry, "resident_bytes", where),
        error=_error(entry.get("error"), f"{where}error"),
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
    sizes = _object(value, "sizes")
    parts = {}
    for part in fields(Sizes):
        counts = _object(sizes.get(part.name), f"sizes.{part.name}")
        where = f"sizes.{part.name}."
        parts[part.name] = ClassBytes(
            **{f.name: _count(counts, f.name, where) for f in fields(ClassBytes)}
        )
    return Sizes(**parts)


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ArtifactError(f"delta.json: {where} is missing or not an object")
    return value


def _text(holder: dict[str, Any], key: str, where: str) -> str:
    value = holder.get(key)
    if not isinstance(value, str) or not value:
        raise ArtifactError(f"delta.json: {where}{key} is missing or not a text")
    return value


def _digest(holder: dict[str, Any], key: str, where: str) -> str:
    value = _text(holder, key, where)
    hexes = value.removeprefix("sha256:")
    if hexes == value or len(hexes) != 64 or set(hexes) - set("0123456789abcdef"):
        raise ArtifactError(f"delta.json: {where}{key} is not a sha256 digest: {value[:80]!r}")
    return value


def _count(holder: dict[str, Any], key: str, where: str) -> int:
    value = holder.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ArtifactError(f"delta.json: {where}{key} is not a number of bytes: {value!r}")
    return value


def _shape(value: object, where: str) -> tuple[int, ...]:
    sane = isinstance(value, list) and len(value) <= MAX_DIMS
    if not sane or not all(type(n) is int and 0 <= n <= MAX_ELEMENTS for n in value):  # type: ignore[attr-defined]
        raise ArtifactError(f"delta.json: {where} is not a shape: {str(value)[:80]}")
    assert isinstance(value, list)
    if math.prod(value) > MAX_ELEMENTS:
        raise ArtifactError(f"delta.json: {where} is too large: {value}")
    return tuple(value)


def _error(value: object, where: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ArtifactError(f"delta.json: {where} is not an error: {value!r}")
    return float(value)
