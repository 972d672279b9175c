"""Reading a delta, which may come from anywhere: everything is checked before use."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.codecs.base import Encoded
from deltaserve.artifact.digest import tensor_lines
from deltaserve.artifact.files import COMPANIONS
from deltaserve.artifact.manifest import MANIFEST, Manifest, artifact_digest
from deltaserve.artifact.memory import MemoryShards, OpenFile, open_file
from deltaserve.artifact.shards import ShardSet
from deltaserve.artifact.writer import STEM
from deltaserve.errors import ArtifactError, BaseMismatchError, CodecError


class Delta:
    """An artifact; tensors are memory-mapped and read when asked for, or all in memory."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        raw: dict[str, Any],
        shards: ShardSet | MemoryShards,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self._raw = raw
        self._shards = shards

    @classmethod
    def open(cls, where: str | os.PathLike[str]) -> Delta:
        """Raises ArtifactError naming what is missing, damaged or unknown.

        Checks the manifest, and that the files hold exactly the parts it promises, in
        dtype and shape. Values are checked by ``encoded``, bytes by ``verify_digest``.
        """
        return cls._checked(Path(where), lambda files: ShardSet(files, ArtifactError))

    @classmethod
    def read(cls, where: str | os.PathLike[str], opener: OpenFile = open_file) -> Delta:
        """The whole artifact in memory, its digest verified; the files may then change or go.

        Raises ArtifactError like ``open`` and ``verify_digest``.
        """
        delta = cls._checked(Path(where), lambda files: MemoryShards(files, ArtifactError, opener))
        delta.verify_digest()
        return delta

    @classmethod
    def _checked(cls, where: Path, read: Callable[[list[Path]], ShardSet | MemoryShards]) -> Delta:
        path = where.expanduser()
        raw = _read_manifest(path)
        manifest = Manifest.from_json(raw)
        delta = cls(path, manifest, raw, read(_files(path)))
        delta._check_parts()
        return delta

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All stored parts."""
        return [self._shards.tensor(name) for name in self._shards.names()]

    def names(self) -> list[str]:
        """Changed parameters, sorted."""
        return sorted(self.manifest.tensors)

    def encoded(self, name: str) -> Encoded:
        """One stored parameter, its values checked. Raises ArtifactError if damaged."""
        entry = self.manifest.tensors[name]
        parts = {part: self._shards.tensor(f"{name}.{part}") for part in entry.layout()}
        enc = Encoded(entry.codec, entry.params, entry.shape, entry.torch_dtype, parts)
        try:
            get_codec(entry.codec).check(enc)
        except CodecError as cause:
            raise self._damaged(name, cause) from None
        return enc

    def decode(self, name: str, base: torch.Tensor | None) -> torch.Tensor:
        """The fine-tuned parameter, given the base's."""
        enc = self.encoded(name)
        try:
            return get_codec(enc.codec).decode(enc, base)
        except CodecError as cause:
            raise self._damaged(name, cause) from None

    def check_base(self, digest: str) -> None:
        """Raises BaseMismatchError, showing both digests, unless the delta is for this base."""
        expected = self.manifest.base
        if digest != expected.digest:
            raise BaseMismatchError(
                f"{self.path} was made for the base {expected.name} with digest "
                f"{expected.digest}, but this base has {digest}; use that base, or compress "
                "the fine-tune against this one"
            )

    def extra_files(self) -> list[Path]:
        """Files that differ from the base's: tokenizer, chat template, configuration."""
        return [self.path / name for name in COMPANIONS if (self.path / name).is_file()]

    def verify_digest(self) -> None:
        """Read every byte; raises ArtifactError if the artifact is not what it says."""
        found = artifact_digest(self._raw, tensor_lines(self._shards))
        if found != self.manifest.digest:
            raise ArtifactError(
                f"{self.path} is damaged: its digest is {found}, delta.json says "
                f"{self.manifest.digest}; copy or compress it again"
            )

    def _check_parts(self) -> None:
        promised = {
            f"{name}.{part}": spec
            for name, entry in self.manifest.tensors.items()
            for part, spec in entry.layout().items()
        }
        for part, (dtype, shape) in promised.items():
            if part not in self._shards:
                raise ArtifactError(f"{self.path}: {part} is missing; copy the delta again")
            found = self._shards.dtype(part), self._shards.shape(part)
            if found != (dtype, shape):
                raise ArtifactError(
                    f"{self._shards.file(part)}: {part} is {found[0]} {list(found[1])}, but "
                    f"delta.json requires {dtype} {list(shape)}; copy the delta again"
                )
        for part in self._shards.names():
            if part not in promised:
                raise ArtifactError(
                    f"{self._shards.file(part)}: {part} is not part of this delta; copy it again"
                )

    def _damaged(self, name: str, cause: CodecError) -> ArtifactError:
        return ArtifactError(f"{self.path}: {name} cannot be decoded: {cause}; copy it again")


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a directory; give the directory of a delta")
    try:
        raw = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} has no {MANIFEST}: it is not a delta; make one with deltaserve compress"
        ) from None
    except (ValueError, OSError, RecursionError) as cause:
        raise ArtifactError(f"{path / MANIFEST} cannot be read: {cause}; copy it again") from None
    if not isinstance(raw, dict):
        raise ArtifactError(f"{path / MANIFEST} does not hold a JSON object; copy it again")
    return raw


def _files(path: Path) -> list[Path]:
    single = path / f"{STEM}.safetensors"
    files = [single] if single.exists() else sorted(path.glob(f"{STEM}-*-of-*.safetensors"))
    if not files:
        raise ArtifactError(f"{single} is missing; copy the delta again")
    return files
